"""Write a policy that pins a base and erasures.

    conceptzap lock van-gogh.lprompt.safetensors
    conceptzap lock van-gogh church --base ./my-model --attacked both-inversion --fail-over ASR=10

For a service that must never draw without its erasures: `generate --policy` draws with these files on this
base, bit for bit, or not at all. Ship the policy with the files, and ask `conceptzap verify` at every start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    paths: options.Files,
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    attacked: Annotated[
        list[Path] | None,
        typer.Option("--attacked", metavar="DIR", parser=options.path, show_default=False,
                     help="Pin the result of `conceptzap attack` on these files. Repeatable."),
    ] = None,
    fail_over: Annotated[
        list[str] | None,
        typer.Option("--fail-over", metavar="ASR=10",
                     help="The most, in percent, that a rate of these results may be. Repeatable."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", parser=options.path,
                     help="The policy to write.")
    ] = Path("conceptzap.lock"),
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    Progress().phase(f"loading {base}")
    made = api.lock(
        paths, output, base=base, prediction=prediction, attacked=attacked or (),
        fail_over=fail_over or (), force=force,
    )  # fmt: skip
    if as_json:
        files = [{"path": pin.path, "digest": pin.digest} for pin in made.files]
        show.emit("lock", {"path": show.full(output), "digest": made.digest, "files": files})
    else:
        show.note(f"policy {made.digest[:12]}; next: conceptzap verify {show.shown(output)}")
        show.lines([show.full(output)])
