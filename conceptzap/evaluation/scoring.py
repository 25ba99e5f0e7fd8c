"""Did it work, and what did it cost the rest? Probes, pictures of base and erased model, judges, scores.

Every probe is drawn by both models from the same seed, every picture counts in every denominator.
Judges and metrics are families: a member is a file, and nothing here knows which there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.edit import Edit, Erasure, canonical_json
from conceptzap.errors import MismatchError
from conceptzap.evaluation import estimates, intervals, judging, probes, suites, verdict
from conceptzap.evaluation.cached import Painter, base_digest
from conceptzap.evaluation.judging import Judge
from conceptzap.evaluation.observing import (
    Count,
    apart,
    identical,
    observe,
    pair,
    silent,
)
from conceptzap.evaluation.probes import Subject, Suite, World
from conceptzap.evaluation.trial import Cell, Trial, View
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import Probe, Result, Score, Settings, check_seed
from conceptzap.task import Task
from conceptzap.trust import canary

CLOSING = "smoke"
DRAWN = 0.5  # a base that shows a concept less often than this does not know it
VERSIONS = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Subjected:
    """An erasure under test: what it is, what it is called here, how strongly it is applied."""

    erasure: Erasure
    name: str
    strength: float = 1.0

    def record(self) -> dict[str, Any]:
        header = self.erasure.header
        return {
            "name": self.name,
            "title": header.title,
            "digest": self.erasure.digest,
            "strength": self.strength,
            "concepts": list(header.concepts),
        }


@dataclass(frozen=True)
class Evaluation:
    """A result with what it came from: the trial, and two painters that have its pictures.

    `words`: erased concept -> every word for it.
    """

    result: Result
    trial: Trial
    bare: Painter
    erased: Painter
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(cell.probe for cell in self.trial.cells)


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before the first picture: `settle` raises whatever can be wrong."""

    suite: Suite
    world: World
    targets: tuple[Subject, ...]
    judges: tuple[Judge, ...]
    settings: Settings
    seed: int


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
) -> Plan:
    """Suite, concepts, judges and settings of a run, all known to be there.

    `limit`: at most so many pictures of a slice. Raises `UsageError` for names that mean nothing,
    `ResourceError` for a judge that is missing.
    """
    about, world = suites.load(suite)
    about = suites.limited(about, limit)
    if about.erase:
        targets = tuple(suites.find(world, concepts))
    else:  # it asks for nothing that is gone, and for all the rest
        targets, world = (), suites.without(world, concepts)
    panel = judging.panel(tuple(judges) or about.judges, base, world)
    judging.check(panel, targets, probes.expand(about, world, targets))
    settings = suites.settings(about, steps, guidance, batch)
    return Plan(about, world, targets, panel, settings, check_seed(seed))


def evaluate_files(
    files: Sequence[tuple[Path, float]],
    base: str = "demo",
    *,
    suite: str = "quick",
    concepts: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
    report: Report | None = None,
    count: Count = silent,
    **request: Any,
) -> Evaluation:
    """Evaluate a stack of files, each (path, strength), on a base; `request` as for `settle`.

    `concepts`: what must be gone; the files' own concepts when none is given. Files, suite and judges
    are checked before any picture is drawn.
    """
    loaded = [Subjected(format.load(path), path.name, strength) for path, strength in files]
    wanted = tuple(concepts) or tuple(c for one in loaded for c in one.erasure.header.concepts)
    here = load_base(base, device, dtype, prediction)
    plan = settle(here, suite, list(dict.fromkeys(wanted)), **request)
    check_fit(here, loaded)
    for one in loaded:
        if foreign(here, one.erasure) and report:
            report.note(f"warning: {one.name} was made and measured on another checkpoint than {here.id}")
    return evaluate(here, loaded, plan, count)


def evaluate(
    base: Base, subjects: Sequence[Subjected], plan: Plan, count: Count = silent
) -> Evaluation:
    """Draw, look, score. `count` passes batches on for whoever shows progress."""
    edits = tuple(e for s in subjects for e in s.erasure.scaled(s.strength).edits)
    digest = base_digest(base)
    bare = Painter(base, plan.settings, (), digest=digest)
    erased = Painter(base, plan.settings, edits, digest=digest)
    return _compare(bare, erased, subjects, plan, count)


def evaluate_base(base: Base, other: Base, plan: Plan, count: Count = silent) -> Evaluation:
    """Another checkpoint in place of an erased model: one that was trained without the concept."""
    bare, erased = (Painter(one, plan.settings) for one in (base, other))
    return _compare(bare, erased, (), plan, count)


def _compare(
    bare: Painter, erased: Painter, subjects: Sequence[Subjected], plan: Plan, count: Count
) -> Evaluation:
    near = _neighbours(bare, plan, count)
    asked = probes.expand(plan.suite, plan.world, plan.targets, near, plan.seed, _seal(subjects))
    before = observe(bare, plan.judges, asked, "drawing with the base", count)
    after = observe(erased, plan.judges, asked, "drawing without the concept", count)
    same = identical(bare, erased, asked, plan.suite.identical, count)
    unit = apart(bare, plan.judges, asked, before, count)
    trial = pair(asked, before, after, plan.targets, same, erased.edits, unit)
    words = {target.name: (*target.words, *target.held_out) for target in plan.targets}
    return Evaluation(_result(bare, subjects, plan, trial), trial, bare, erased, words)


def check_fit(base: Base, subjects: Iterable[Subjected]) -> None:
    """Raise unless every erasure is of this architecture and acts here (its self-test, `canary`)."""
    for subject in subjects:
        made_for = subject.erasure.header.base
        if made_for.signature != base.signature:
            raise MismatchError(
                f"{subject.name} was made for {made_for.family} ({made_for.id}), not for {base.id}",
                "name its checkpoint with --base",
            )
        canary.check(base, subject.erasure, exact=not foreign(base, subject.erasure))


def foreign(base: Base, erasure: Erasure) -> bool:
    """Whether an erasure was made on another checkpoint of this architecture."""
    here = base.fingerprint(site for edit in erasure.edits for site in edit.sites)
    return any(here.get(part) != mark for part, mark in erasure.header.base.fingerprint.items())


def _seal(subjects: Sequence[Subjected]) -> str:
    digests = sorted(subject.erasure.digest for subject in subjects)
    return hashlib.sha256(canonical_json(digests).encode()).hexdigest()


def _neighbours(bare: Painter, plan: Plan, count: Count) -> list[Subject]:
    """The nearest concepts of every target, but for the targets themselves."""
    if not plan.suite.neighbours:
        return []
    found: dict[Subject, None] = {}
    for target in plan.targets:
        asked = suites.portrait(plan.suite, plan.world, target)
        seen = observe(bare, plan.judges, asked, "looking for neighbours", count).views
        text = suites.by_text(bare.base, plan.world, target)
        confused = suites.by_confusion(seen, plan.world, target)
        near = suites.nearest(plan.suite.neighbours, text, confused)
        found |= dict.fromkeys(subject for subject in near if subject not in plan.targets)
    return list(found)


def measure(trial: Trial) -> tuple[Score, ...]:
    """Every score of every metric that has something to say about this trial."""
    members = (family.load("metrics", name) for name in family.members("metrics"))
    return tuple(score for member in members for score in member.score(trial))


def _oracle(plan: Plan, digest: str) -> dict[str, Any]:
    """What a model trained without the concept scores, where the suite's judges come with that."""
    name = plan.suite.judges[0] if plan.suite.judges else ""
    member = family.load("judges", name) if name in family.members("judges") else None
    if len(plan.targets) != 1 or not hasattr(member, "oracle"):
        return {}
    return member.oracle(plan.suite.name, plan.targets[0].name, digest)


def _result(bare: Painter, subjects: Sequence[Subjected], plan: Plan, trial: Trial) -> Result:
    scores, base = measure(trial), bare.base
    shares = {target.name: plan.world.share(target.name) for target in plan.targets}
    return Result(
        subject={"files": [subject.record() for subject in subjects], "concepts": shares},
        base={"id": base.id, "family": base.family, "digest": bare.digest},
        suite=plan.suite.name,
        settings=plan.settings.record(),
        seed=plan.seed,
        judges=judging.record(plan.judges),
        probes=probes.digest(cell.probe for cell in trial.cells),
        scores=scores,
        failed=verdict.legs(scores),
        oracle=_oracle(plan, bare.digest),
        versions={name: metadata.version(name) for name in VERSIONS},
    )


# -- what `erase` ends with -------------------------------------------------------------------


def closing(
    base: Base,
    edits: Sequence[Edit],
    task: Task,
    settings: Settings,
    seed: int,
    report: Report | None = None,
) -> dict[str, Score]:
    """The figures `erase` ends with: the smoke suite on a base whose own judges there are, else {}.

    `leak`: share of pictures of a concept in which either judge still sees it. `object_kept` (styles)
    and `style_kept` (objects): of those pictures, the share whose other half is still right where
    the base's was. `preservation`: how much of what the judges recognise in the base's other
    pictures they still recognise, same seeds, averaged over labels. `report` is warned of a concept
    that the judges do not know, or the base hardly draws: its figures then say nothing.
    """
    suite, world = suites.load(CLOSING)
    member = family.load("judges", suite.judges[0])
    if not member.fits(base):
        return {}
    report = report or Report()
    for concept in (concept for concept in task.concepts if not world.find(concept)):
        report.warn(f"no judge knows {concept!r}, so nothing says whether it is gone")
    targets = list(dict.fromkeys(filter(None, map(world.find, task.concepts))))
    if not targets:
        return {}
    share = {name: max(1, count // len(targets)) for name, count in suite.erase.items()}
    asked = probes.expand(replace(suite, erase=share), world, targets, seed=seed)
    judges, digest = member.load(base), base_digest(base)
    before = observe(Painter(base, settings, (), digest=digest), judges, asked)
    after = observe(Painter(base, settings, edits, digest=digest), judges, asked)
    trial = pair(asked, before, after, targets)
    _warn_of_undrawn(base, trial, report)
    return _closing_scores(trial)


def _warn_of_undrawn(base: Base, trial: Trial, report: Report) -> None:
    """Nothing can be taken out of a base that hardly has it, so no leak is no success there."""
    for kind, name in trial.targets:
        cells = trial.erased(name)
        shown = sum(cell.before.seen(kind, name, cell.depth(kind)) for cell in cells)
        if shown < DRAWN * len(cells):
            report.warn(
                f"{base.id} itself shows {name!r} in {shown} of {len(cells)} pictures that ask for it,"
                " so there is little to erase"
            )


def _closing_scores(trial: Trial) -> dict[str, Score]:
    kinds = {name: kind for kind, name in trial.targets}
    cells = trial.erased()
    leaks = [_leaks(cell, kinds[cell.probe.concept]) for cell in cells]
    scores = {"leak": intervals.rate("leak", leaks, "lower")}
    for other in sorted({kind for cell in cells for kind, _ in cell.probe.expect}):
        chosen = [c for c in cells if kinds[c.probe.concept] != other and _right(c, other, c.before)]
        if chosen:
            right = [_right(cell, other, cell.after) for cell in chosen]
            scores[f"{other}_kept"] = intervals.rate(f"{other}_kept", right)
    scores["preservation"] = intervals.statistic(
        "preservation", estimates.kept(trial), lambda rates: estimates.kept_share(rates, 0.0)
    )
    return scores


def _leaks(cell: Cell, kind: str) -> bool:
    return cell.after.seen(kind, cell.probe.concept, cell.depth(kind))


def _right(cell: Cell, kind: str, view: View) -> bool:
    """Do all judges see every label of a kind that the probe asked for?"""
    wanted = cell.probe.labels(kind)
    return bool(wanted) and all(view.kept(kind, label, cell.depth(kind)) for label in wanted)
