"""Evaluation from names to a result: all is checked at once, then both models are drawn and judged."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conceptzap.base import Base
from conceptzap.errors import ThresholdError, UsageError, escape
from conceptzap.evaluation import judging, probes, run, suites, verdict
from conceptzap.evaluation.run import Evaluation, Experiment
from conceptzap.page import folder
from conceptzap.report import Report
from conceptzap.result import Result, check_comparable, check_seed
from conceptzap.trust import admission
from conceptzap.trust.admission import Asked, Loaded
from conceptzap.verbs import launched
from conceptzap.verbs.generating import described, find_base
from conceptzap.verbs.launched import Team

WANTED = "name a result.json, or the folder of one"


def settle(
    base: Base,
    suite: str,
    concepts: Sequence[str],
    *,
    judges: Sequence[str] = (),
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    limit: int | None = None,
) -> Experiment:
    """Suite, concepts, judges and settings of a run, all known to be there.

    `limit`: at most so many pictures of a slice. Raises `UsageError` for names that mean nothing,
    `ResourceError` for a judge that is missing.
    """
    about, world = suites.load(suite)
    about = suites.limited(about, limit)
    if about.erase:
        targets = tuple(suites.find(about, world, concepts))
    else:  # it asks for nothing that is gone, and for all the rest
        targets, world = (), suites.without(world, concepts)
    panel = judging.panel(tuple(judges) or about.judges, base, world)
    judging.check(panel, targets, probes.expand(about, world, targets))
    settings = suites.settings(about, steps, guidance, batch)
    return Experiment(about, world, targets, panel, settings, check_seed(seed))


def evaluate(
    erasures: Iterable[Asked],
    base: Any,
    *,
    suite: str,
    concepts: Sequence[str],
    fail_under: Iterable[str] | None,
    device: str,
    dtype: str,
    prediction: str | None,
    strict: bool,
    output: Path | str | None,
    force: bool,
    report: Report,
    **request: Any,
) -> Evaluation:
    """See `api.evaluate`; `request` as for `settle`."""
    # 1. all that can be known to be wrong before the base is loaded
    thresholds = verdict.parse(fail_under or ())
    loaded = admission.load_all(erasures)
    team = Team(device)
    target = folder.prepare(Path(output), force) if output is not None and team.leads else None
    # 2. and before anything is drawn
    here = find_base(base, team.device, dtype, prediction)
    report.phase(described(here))
    named = concepts or [concept for one in loaded for concept in one.erasure.header.concepts]
    experiment = settle(here, suite, list(dict.fromkeys(named)), **request)
    asked = probes.expand(experiment.suite, experiment.world, experiment.targets)
    for line in verdict.shortfalls(thresholds, verdict.expected(asked)):
        report.warn(line)
    admission.admit_all(here, [one.erasure for one in loaded], strict, report)
    # 3. pictures, judges, scores
    with launched.drawing(team):
        done = run.evaluate(here, loaded, experiment, report)
    name = os.fspath(base) if isinstance(base, (str, os.PathLike)) else here.id
    done = _with_commands(done, loaded, name, suite, concepts, request)
    if target is not None:
        report.phase("writing the report")
        done = replace(done, written=folder.write(done, target, force, report))
    if fail_under is not None and team.leads:
        _enforce(done, thresholds)
    return done


def _enforce(done: Evaluation, thresholds: Mapping[str, float]) -> None:
    written = done.written.get("report")
    try:
        verdict.enforce(done.result, thresholds, f"see {escape(written)}" if written else "")
    except ThresholdError as error:
        error.made = done
        raise


# the command lines that say how it was made


def _with_commands(
    done: Evaluation,
    loaded: Sequence[Loaded],
    base: str,
    suite: str,
    concepts: Sequence[str],
    request: Mapping[str, Any],
) -> Evaluation:
    """With the command that repeats the run, and the options that draw one of its pictures again.

    Files and checkpoints are named as they were, absolute paths by their last part alone.
    """
    files = [_named(one) for one in loaded]
    on = [] if base == "demo" else ["--base", _short(base)]
    words = ["conceptzap", "evaluate", *files, "--suite", suite, *on]
    for concept in concepts:
        words += ["--concept", concept]
    for option, value in request.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        for one in values if value not in (None, 0, (), []) else ():
            words += [f"--{option.removesuffix('s') if option == 'judges' else option}", str(one)]
    drawn = done.result.settings
    look = ["--steps", str(drawn["steps"]), "--guidance", f"{drawn['guidance']:g}"]
    under = [word for file in files for word in ("--with", file)]
    return replace(done, command=shlex.join(words), request=(*under, *on, *look))


def _named(one: Loaded) -> str:
    path = _short(str(one.path)) if one.path else one.erasure.header.title
    return path if one.strength == 1 else f"{path}:{one.strength:g}"


def _short(path: str) -> str:
    return Path(path).name if os.path.isabs(path) else path


# results, read again


def read(path: Path | str) -> Result:
    """The result in a file, or in the folder of an evaluation; `UsageError` when there is none."""
    file = Path(path)
    file = file / folder.RESULT if file.is_dir() else file
    try:
        return Result.from_record(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"cannot read {escape(file)}: {error.strerror}", WANTED) from error
    except ValueError as error:
        raise UsageError(f"{escape(file)} is no JSON", WANTED) from error
    except UsageError as error:
        raise UsageError(f"{escape(file)}: {error}", error.hint) from error


def compare(paths: Sequence[Path | str]) -> dict[str, Result]:
    """See `api.compare`."""
    if not paths:
        raise UsageError("nothing to compare", WANTED)
    results = [read(path) for path in paths]
    check_comparable(results)
    return dict(zip(columns(paths, results), results, strict=True))


def columns(paths: Sequence[Path | str], results: Sequence[Result]) -> list[str]:
    """A name for each result: its erasures, where that is not enough their folder, then a number."""
    titles = [_subject(result) for result in results]
    folders = [Path(os.path.abspath(path)) for path in paths]
    places = [(one if one.is_dir() else one.parent).name for one in folders]
    named = [
        f"{place}: {title}" if titles.count(title) > 1 else title
        for place, title in zip(places, titles, strict=True)
    ]
    return [
        f"{name} ({named[: index + 1].count(name)})" if named.count(name) > 1 else name
        for index, name in enumerate(named)
    ]


def _subject(result: Result) -> str:
    return " + ".join(
        file["name"] if file["strength"] == 1 else f"{file['name']}:{file['strength']:g}"
        for file in result.subject["files"]
    ) or result.base["id"]
