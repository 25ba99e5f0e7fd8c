"""Put results of `evaluate` side by side.

    conceptzap compare van-gogh-quick other-quick
    conceptzap compare a/result.json b/result.json --json

Results of different settings are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT", parser=options.path, show_default=False,
                       help="Folders of `evaluate`, or their result.json; two or more."),
    ],
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import figures
    from conceptzap.terminal.progress import Progress

    Progress().phase("reading results")
    found = api.compare(results)
    figures.compared(dict(zip(found, results, strict=True)), found, as_json)
