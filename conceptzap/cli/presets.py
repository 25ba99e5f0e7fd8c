"""List the presets, or the words of one.

    conceptzap presets
    conceptzap presets style
"""

from __future__ import annotations

from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Show what this one says.", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap.registry import catalog, config
    from conceptzap.terminal import show

    if as_json:
        found = [{"name": name, **config.preset(name)}] if name else catalog.presets()
        show.emit("presets", {"presets": found})
    elif name:
        show.preset(name, config.preset(name))
    else:
        show.presets(catalog.presets())
