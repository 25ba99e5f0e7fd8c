"""Draw a sheet of what the demo checkpoint knows.

    conceptzap demo
    conceptzap demo --seed 7 -o grid.png

Objects by styles. With --words, list every word it knows a picture for instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from conceptzap.cli import _options as options

# every eighth object: one or two of each group
EVERY = 8


def run(
    seed: options.Seed = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Sampling steps, 1 to 1000.")
    ] = None,
    device: options.Device = "auto",
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE.png", parser=options.path,
                     callback=options.png, help="The sheet to write."),
    ] = Path("demo.png"),
    words: Annotated[bool, typer.Option("--words", help="Only list what it knows.")] = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap.demo import world
    from conceptzap.format import atomic
    from conceptzap.terminal import show

    known = {
        "objects": [one.name for one in world.OBJECTS],
        "styles": [one.name for one in world.STYLES],
    }
    if not words:
        atomic.check_writable(output, force)
        _draw(known, output, force, seed=seed, steps=steps, device=device)
    if as_json:
        show.emit("demo", {"path": None if words else show.full(output), **known})
    else:
        show.lines([*known["objects"], *known["styles"]] if words else [show.full(output)])


def _draw(known: dict[str, list[str]], output: Path, force: bool, **request: Any) -> None:
    """One sheet: a row a style, a column an object."""
    from conceptzap import api
    from conceptzap.demo import world
    from conceptzap.terminal import gallery
    from conceptzap.terminal.progress import Progress

    objects, report = known["objects"][::EVERY], Progress()
    rows = [(style, [world.caption(one, style, 0) for one in objects]) for style in known["styles"]]
    prompts = [prompt for _, row in rows for prompt in row]
    report.phase("loading demo")
    pictures = api.generate(prompts, batch=len(objects), report=report, **request)
    gallery.sheet(rows, report.count(pictures, len(prompts), "drawing"), output, force)
