"""Erase concepts from a checkpoint; one small file comes out.

    conceptzap erase "Van Gogh" --anchor painting
    conceptzap erase church --anchor house --keep castle --seed 1 -o church

The checkpoint stays as it is. At the end: the scores, a before/after picture beside the file, and the
command that draws with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options

DEFAULTS = {"base": "demo", "seed": 0, "device": "auto", "dtype": "auto"}
NAMES = {"anchor": "anchors", "set": "overrides"}


def run(
    concepts: Annotated[
        list[str], typer.Argument(metavar="CONCEPT", help="What goes; @file for one a line.")
    ],
    anchor: Annotated[
        list[str] | None,
        typer.Option("--anchor", metavar="A", help="What it becomes: one for all, or one each."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="K", help="What must stay. Repeatable, or @file."),
    ] = None,
    method: options.Method = None,
    preset: options.Preset = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="A setting of the method. Repeatable."),
    ] = None,
    toml: Annotated[
        Path | None,
        typer.Option("--config", metavar="TOML", help="These options from a file; [set] as table."),
    ] = None,
    base: Annotated[str | None, options.BASE] = None,
    prediction: options.Prediction = None,
    seed: Annotated[int | None, options.SEED] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Optimisation steps.")
    ] = None,
    device: Annotated[str | None, options.DEVICE] = None,
    dtype: Annotated[str | None, options.DTYPE] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="[<concept>.lprompt.safetensors]"),
    ] = None,
    force: options.Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Show the plan, do nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api, config, show
    from conceptzap.errors import ThresholdError
    from conceptzap.progress import Progress

    given = {
        "anchor": options.words(anchor), "keep": options.words(keep), "method": method,
        "preset": preset, "set": config.parse_sets(set_ or ()), "base": base, "seed": seed,
        "prediction": prediction, "steps": steps, "device": device, "dtype": dtype,
    }  # fmt: skip
    request = options.layered(toml, given, DEFAULTS)
    request = {NAMES.get(key, key): value for key, value in request.items()}
    request |= {"output": output, "force": force, "resume": resume}
    words = options.words(concepts)
    if dry_run:
        planned = api.plan(words, **request)
        show.emit("plan", planned) if as_json else show.plan(planned)
        return
    try:
        made = api.erase(words, **request, report=Progress())
    except ThresholdError as error:
        if not as_json:
            show.erased(show.erased_record(error.made), words[0], request["base"])
        raise
    record = show.erased_record(made)
    if as_json:
        show.emit("erase", record)
    else:
        show.erased(record, words[0], request["base"])
