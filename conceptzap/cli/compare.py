"""Put results of `evaluate` side by side.

    conceptzap compare van-gogh-quick/result.json other-quick/result.json
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
        typer.Argument(metavar="RESULT.json", parser=options.path,
                       help="Two or more.", show_default=False),
    ],
    as_json: options.AsJson = False,
) -> None:
    from conceptzap.page.results import compared, read
    from conceptzap.result import check_comparable

    found = [read(path) for path in results]
    check_comparable(found)
    compared(results, found, as_json)
