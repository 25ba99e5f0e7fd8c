"""Check that a policy is in force: READY or exit 6.

    conceptzap verify
    conceptzap verify my.lock --json

A policy is written by `conceptzap lock`. Its files, its base and their self-tests are looked at here, on
this machine: READY says that `conceptzap generate --policy` will draw erased.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", parser=options.path, help="The policy to check.")
    ] = Path("conceptzap.lock"),
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    Progress().phase("checking files, base and self-tests")
    held = api.verify(path, device=device)
    if as_json:
        show.emit("verify", {"path": show.full(path), "digest": held.digest, "ready": True})
    else:
        show.note(f"policy {held.digest[:12]}: all that it asks for is in force")
        show.lines(["READY"])
