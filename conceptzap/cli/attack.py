"""Try to bring an erased concept back, and count successes.

    conceptzap attack van-gogh --attack inversion
    conceptzap attack church --attack unlearndiffatk --fail-over ASR=10 -o church-attacked

The rate before counts the concept where nobody attacks, the rate after (ASR) what comes through as
well, in the worst form of the attack. An attack says something only beside its controls, the attacks
seeds and random-tokens. An attack that was stopped goes on where it was when it is given again.

Exit 7, with the result written: a rate is over --fail-over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options
from conceptzap.registry import family

# those that other packages bring are completed, and take longer to find
KNOWN = [stem.replace("_", "-") for stem in family.files("attacks")]


def _attacks(incomplete: str) -> list[str]:
    known = (stem.replace("_", "-") for stem in family.members("attacks"))
    return [name for name in known if name.startswith(incomplete)]


def run(
    erasures: Annotated[
        list[str],
        typer.Argument(metavar="FILE[:STRENGTH]", help="Erasures, attacked together.", show_default=False),
    ],
    attack: Annotated[
        str,
        typer.Option("--attack", metavar="NAME", autocompletion=_attacks,
                     help="One of " + ", ".join(KNOWN) + "; see `conceptzap attacks`."),
    ],
    budget: Annotated[
        str, typer.Option("--budget", metavar="BUDGET", help="quick (minutes) or paper (as published).")
    ] = "quick",
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", metavar="C",
                     help="What is to come back.  [default: what the files erase]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="A setting: see `conceptzap attacks`. Repeatable."),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option("--form", metavar="F",
                     help="A form of it, and no other: transfer, straight-through, evade, continuous. "
                          "Repeatable.  [default: all that differ]"),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", metavar="N", help="Prompts of a concept.  [default: 16, paper: 64]"),
    ] = None,
    suite: Annotated[
        str, typer.Option("--suite", metavar="S", help="Where prompts and classifiers come from.")
    ] = "quick",
    judge: options.Judges = None,
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    seed: options.Seed = 0,
    steps: options.SuiteSteps = None,
    guidance: options.Guidance = None,
    batch: options.SuiteBatch = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    fail_over: options.FailOver = None,
    oracle: Annotated[
        str | None,
        typer.Option("--oracle", metavar="BASE",
                     help="A checkpoint that never knew the concept, attacked in the same way."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", parser=options.path,
                     help="Folder of report.html, result.json, attempts.csv, found.safetensors, images."),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.errors import ThresholdError
    from conceptzap.page import folder
    from conceptzap.registry import config
    from conceptzap.terminal import figures
    from conceptzap.terminal.progress import Progress
    from conceptzap.verbs import launched

    stack = [options.erasure(text) for text in erasures]
    try:
        done = api.attack(
            stack, attack, base, budget=budget, overrides=config.parse_sets(settings or ()),
            prompts=prompts, suite=suite, concepts=options.words(concept), judges=judge or (), seed=seed,
            steps=steps, guidance=guidance, batch=batch, device=device, dtype=dtype,
            prediction=prediction, forms=form or (), fail_over=fail_over or (), force=force, oracle=oracle,
            report=Progress(),
            output=output or folder.usual([path for path, _ in stack], attack),
        )  # fmt: skip
    except ThresholdError as error:
        if error.made and not as_json:  # the error is otherwise the one object on stdout
            figures.attacked(error.made, as_json)
        raise
    if launched.leads():
        figures.attacked(done, as_json)
