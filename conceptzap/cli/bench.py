"""Measure several methods on several concepts, side by side.

    conceptzap bench --method uce --method esd --concept "Van Gogh:painting" --concept church:house
    conceptzap bench plan.toml --suite standard -o standard

Every method gets the same budget: its settings as they are, none tuned; only a preset hardens. The folder
gets the erasures, bench.json, bench.csv and a page with E against P. The same command goes on where it
was stopped; a cell that fails is told of, the others go on, and the exit code is 1. `accelerate launch -m
conceptzap bench ...` shares the cells out among its processes.

A TOML file has the keys methods, concepts, suites, attacks, judges, preset, base, prediction, seed, steps,
guidance, batch, limit, device, dtype, and a table [set.METHOD] of settings; options win over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _errors
from conceptzap.cli import _options as options


def _table(pairs: list[str]) -> dict[str, dict[str, str]]:
    """`["esd.steps=50"]` -> `{"esd": {"steps": "50"}}`."""
    from conceptzap.errors import UsageError
    from conceptzap.registry import config

    table: dict[str, dict[str, str]] = {}
    for key, value in config.parse_sets(pairs).items():
        method, dot, name = key.partition(".")
        if not dot:
            raise UsageError(f"--set {key}={value} names no method", f"for example: --set esd.{key}={value}")
        table.setdefault(method, {})[name] = value
    return table


def run(
    plan: Annotated[
        Path | None,
        typer.Argument(metavar="TOML", parser=options.path, show_default=False, help="What to bench."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="M", help="See `conceptzap methods`. Repeatable.",
                     autocompletion=options.METHOD.autocompletion),
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", metavar="C[:ANCHOR]", help="What goes, and what it becomes. Repeatable."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", metavar="S", help="What to ask. Repeatable.  [default: quick]"),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", metavar="A", help="See `conceptzap attack`. Repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.key=value", help="A setting of a method. Repeatable."),
    ] = None,
    preset: options.Preset = None,
    judge: options.Judges = None,
    base: Annotated[str | None, options.usually(options.BASE, "demo")] = None,
    prediction: options.Prediction = None,
    seed: Annotated[int | None, options.usually(options.SEED, 0)] = None,
    steps: options.SuiteSteps = None,
    guidance: options.Guidance = None,
    batch: options.SuiteBatch = None,
    limit: options.Limit = None,
    device: Annotated[str | None, options.usually(options.DEVICE, "auto")] = None,
    dtype: Annotated[str | None, options.usually(options.DTYPE, "auto")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", parser=options.path, help="The folder.")
    ] = Path("bench"),
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.errors import ConceptZapError
    from conceptzap.terminal import figures
    from conceptzap.terminal.progress import Progress

    done = api.bench(
        plan, methods=options.words(method), concepts=options.words(concept), suites=suite or (),
        attacks=attack or (),
        settings=_table(set_ or []), preset=preset, judges=judge or (), base=base,
        prediction=prediction, seed=seed, steps=steps, guidance=guidance, batch=batch, limit=limit,
        device=device, dtype=dtype, output=output, force=force, report=Progress(),
    )  # fmt: skip
    error = None
    if done.failed:
        failed = f"{len(done.failed)} of {len(done.cells)} cells failed"
        error = ConceptZapError(failed, "fix what each says and give the same command again")
    if done.leads:
        figures.benched(done, as_json, error and _errors.record(error))
    if error and done.leads:  # a launcher ends all processes as soon as one fails
        _errors.leave([error], as_json)
