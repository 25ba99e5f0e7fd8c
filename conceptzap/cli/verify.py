"""Check that a policy is in force: READY or exit 6.

    conceptzap verify
    conceptzap verify my.lock --json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="The policy to check.")
    ] = Path("conceptzap.lock"),
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import policy, show

    found = policy.read(path)
    policy.verify(found)
    if as_json:
        show.emit("verify", {"path": show.full(path), "digest": found.digest, "ready": True})
    else:
        show.note(f"policy {found.digest[:12]}: everything it asks for is in force")
        show.lines(["READY"])
