"""Write a policy that pins a base and erasures.

    conceptzap lock van-gogh.lprompt.safetensors
    conceptzap lock a.lprompt.safetensors b.lprompt.safetensors --base ./my-model -o my.lock
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    paths: options.Files,
    base: options.Base = "demo",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The policy to write.")
    ] = Path("conceptzap.lock"),
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import policy, show

    digest = policy.write(output, base, paths, force=force)
    if as_json:
        show.emit("lock", {"path": show.full(output), "digest": digest})
    else:
        show.note(f"policy {digest[:12]}; check it with: conceptzap verify {show.shown(output)}")
        show.lines([show.full(output)])
