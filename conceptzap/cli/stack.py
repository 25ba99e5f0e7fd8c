"""Write one file from several erasures.

    conceptzap stack van-gogh church
    conceptzap stack *.lprompt.safetensors -o all --json

The order of the files makes no difference. A concept that several files erase is warned of; with --base
also a gate that opens for the concept of another file, as the base's text encoders have it. With --elastic
files that act on every prompt act only as far as a prompt comes near their concepts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    paths: options.Files,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", parser=options.path,
                     help="The file to write.  [default: what it erases, joined by +]"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="B", show_default=False,
                     help="Ask every gate about the other files' concepts; nothing is drawn."),
    ] = None,
    elastic: Annotated[
        bool,
        typer.Option("--elastic", help="Gate what acts on every prompt by how near one comes; with --base."),
    ] = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    made = api.stack_files(paths, output, force, Progress(), base, elastic)
    record = show.stack_record(made)
    show.emit("stack", record) if as_json else show.stacked(record)
