"""Measure what erasures took out and what they cost.

    conceptzap evaluate van-gogh.lprompt.safetensors
    conceptzap evaluate church.lprompt.safetensors --suite standard --fail-under E=95 --fail-under P=90

Scores have intervals and go into a one-page report. Base and erased model draw the same prompts from
the same seeds; classifiers say what they see. A run that was stopped goes on where it was when the same
command is given again.

Exit 7, with the report written: the concept is still drawn (E under 90 %, or under --fail-under E=),
or another threshold is not reached. A base that hardly draws the concept itself gives no verdict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options
from conceptzap.registry import config


def _suites(incomplete: str) -> list[str]:
    return [name for name in config.preset_names("suites") if name.startswith(incomplete)]


def run(
    erasures: Annotated[
        list[str],
        typer.Argument(metavar="FILE[:STRENGTH]", help="Erasures, evaluated together.",
                       show_default=False),
    ],
    suite: Annotated[
        str,
        typer.Option("--suite", metavar="S", autocompletion=_suites,
                     help="smoke, bench, quick, standard, full; imagenette, unlearncanvas, i2p, artists,"
                     " coco."),
    ] = "quick",
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", metavar="C", help="What must be gone.  [default: what the files erase]"),
    ] = None,
    judge: options.Judges = None,
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    seed: options.Seed = 0,
    steps: options.SuiteSteps = None,
    guidance: options.Guidance = None,
    batch: options.SuiteBatch = None,
    limit: options.Limit = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="E=95",
                     help="Exit 7 unless the lower interval limit reaches this percentage. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", parser=options.path,
                     help="Folder of result.json, report.html, cells.csv and images."),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.errors import ThresholdError
    from conceptzap.page import folder
    from conceptzap.terminal import figures
    from conceptzap.terminal.progress import Progress
    from conceptzap.verbs import launched

    stack = [options.erasure(text) for text in erasures]
    try:
        done = api.evaluate(
            stack, base, suite=suite, concepts=options.words(concept), judges=judge or (), seed=seed,
            steps=steps, guidance=guidance, batch=batch, limit=limit, device=device, dtype=dtype,
            prediction=prediction, fail_under=fail_under or (), force=force, report=Progress(),
            output=output or folder.usual([path for path, _ in stack], suite),
        )  # fmt: skip
    except ThresholdError as error:
        if error.made and not as_json:  # the error is otherwise the one object on stdout
            figures.evaluated(error.made.result, error.made.written, as_json)
        raise
    if launched.leads():
        figures.evaluated(done.result, done.written, as_json)
