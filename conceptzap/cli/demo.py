"""Draw a sheet of what the demo checkpoint knows.

    conceptzap demo
    conceptzap demo --seed 7 -o grid.png

Objects by styles. With --words, list every word it knows a picture for instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
        Path, typer.Option("--output", "-o", metavar="FILE.png", help="The sheet to write.")
    ] = Path("demo.png"),
    words: Annotated[bool, typer.Option("--words", help="Only list what it knows.")] = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api, files, gallery, show
    from conceptzap.demo import world
    from conceptzap.progress import Progress

    known = {"objects": [one.name for one in world.OBJECTS], "styles": [s.name for s in world.STYLES]}
    if not words:
        files.check_writable(output, force)
        rows = [(s, [world.caption(o, s, 0) for o in known["objects"][::EVERY]]) for s in known["styles"]]
        prompts = [prompt for _, row in rows for prompt in row]
        pictures = api.generate(prompts, seed=seed, steps=steps, device=device, batch=len(rows[0][1]))
        gallery.sheet(rows, Progress().count(pictures, len(prompts), "drawing"), output, force)
    if as_json:
        show.emit("demo", {"path": None if words else show.full(output), **known})
    else:
        show.lines([*known["objects"], *known["styles"]] if words else [show.full(output)])
