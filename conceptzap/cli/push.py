"""Share an erasure on the Hugging Face hub, with its model card.

    conceptzap push van-gogh someone/erasures
    conceptzap push van-gogh someone/erasures --dry-run -o card

The card has the pictures before and after, scores with intervals, digest, base, method and how to load
it. Others then name the file as hf://someone/erasures/van-gogh wherever an erasure is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="An erasure.", show_default=False,
                       autocompletion=options._erasures),
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="USER/REPO", help="Where to; made if it is not there.", show_default=False),
    ],
    private: Annotated[bool, typer.Option("--private", help="For nobody else to see.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="R", help="The branch, made if it is not there.  [default: main]"),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("--message", metavar="TEXT", help="Of the commit.  [default: title and digest]"),
    ] = None,
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="As the hub calls it.  [default: that of the base]")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Write the card here and push nothing.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", parser=options.path,
                     help="The card's folder in a dry run.  [default: FILE-card]"),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    done = api.push(
        file, repo, private=private, revision=revision, message=message, licence=licence,
        dry_run=dry_run, output=output, force=force, report=Progress(),
    )  # fmt: skip
    if as_json:
        show.emit("push", {**vars(done), "files": list(done.files), "card": show.full(done.card)})
    elif done.card:
        show.lines([show.full(done.card)])
    else:
        show.note(f"{len(done.files)} files at {done.url}, digest {done.digest[:12]}")
        show.lines([done.name])
