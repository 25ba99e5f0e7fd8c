"""Report versions, devices, disk and cache.

    conceptzap doctor
    conceptzap doctor --clear

The text to paste under a question.
"""

from __future__ import annotations

from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    clear: Annotated[bool, typer.Option("--clear", help="Empty the cache first.")] = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap.format import cache
    from conceptzap.terminal import environment, show
    from conceptzap.terminal.progress import Progress

    Progress().phase("looking at this machine")
    freed = cache.clear() if clear else None
    found = environment.report()
    problems = environment.problems(found)
    if as_json:
        show.emit("doctor", {**found, "problems": problems, "cleared": freed})
    else:
        show.doctor(found, problems, freed)
