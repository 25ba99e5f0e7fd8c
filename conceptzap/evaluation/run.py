"""Did it work, and what did it cost the rest? Probes, pictures of base and erased model, judges, scores.

Every probe is drawn by both models from the same seed, every picture counts in every denominator.
Judges and metrics are families: a member is a file, and nothing here knows which there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from conceptzap.base import Base
from conceptzap.edit import canonical_json
from conceptzap.evaluation import estimates, judging, probes, suites, verdict
from conceptzap.evaluation.cached import CachedSampler, base_digest
from conceptzap.evaluation.comparison import Comparison
from conceptzap.evaluation.judging import Judge
from conceptzap.evaluation.observing import apart, identical, observe, pair
from conceptzap.evaluation.probes import Subject, Suite, World
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import Probe, Result, Score, Settings
from conceptzap.trust.admission import Loaded

VERSIONS = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Experiment:
    """Everything that is settled before the first picture of an evaluation."""

    suite: Suite
    world: World
    targets: tuple[Subject, ...]
    judges: tuple[Judge, ...]
    settings: Settings
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """A result with what it came from: the comparison, and two samplers that have its pictures.

    `words`: erased concept -> every word for it. `command`: the command line that repeats it, and
    `request` what of it a `generate` of the same pictures needs. `written`: the files it was
    written to, by name, {} where it was not.
    """

    result: Result
    comparison: Comparison
    bare: CachedSampler
    erased: CachedSampler
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    command: str = ""
    request: tuple[str, ...] = ()
    written: Mapping[str, Path] = field(default_factory=dict)

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(sample.probe for sample in self.comparison.samples)


def evaluate(
    base: Base, loaded: Sequence[Loaded], experiment: Experiment, report: Report | None = None
) -> Evaluation:
    """Draw, look, score: a base against itself under erasures that were admitted to it."""
    edits = tuple(edit for one in loaded for edit in one.edits)
    digest = base_digest(base)
    bare = CachedSampler(base, experiment.settings, (), digest=digest)
    erased = CachedSampler(base, experiment.settings, edits, digest=digest)
    return _compare(bare, erased, loaded, experiment, report or Report())


def evaluate_base(
    base: Base, other: Base, experiment: Experiment, report: Report | None = None
) -> Evaluation:
    """Another checkpoint in place of an erased model: one that was trained without the concept."""
    bare, erased = (CachedSampler(one, experiment.settings) for one in (base, other))
    return _compare(bare, erased, (), experiment, report or Report())


def _compare(
    bare: CachedSampler,
    erased: CachedSampler,
    loaded: Sequence[Loaded],
    experiment: Experiment,
    report: Report,
) -> Evaluation:
    suite, judges, targets = experiment.suite, experiment.judges, experiment.targets
    # 1. what to ask: the suite's probes, and those that the erasures' own digests choose
    near = _neighbours(bare, experiment, report)
    asked = probes.expand(suite, experiment.world, targets, near, experiment.seed, _seal(loaded))
    # 2. both models draw the same probes from the same seeds, the judges look at each
    before = observe(bare, judges, asked, "drawing with the base", report)
    after = observe(erased, judges, asked, "drawing without the concept", report)
    # 3. what one by one and a second seed add: bit-identity, and a unit of distance
    same = identical(bare, erased, asked, suite.identical, report)
    unit = apart(bare, judges, asked, before, report)
    comparison = pair(asked, before, after, targets, same, erased.edits, unit)
    words = {target.name: (*target.words, *target.held_out) for target in targets}
    return Evaluation(_result(bare, loaded, experiment, comparison), comparison, bare, erased, words)


def _seal(loaded: Sequence[Loaded]) -> str:
    digests = sorted(one.erasure.digest for one in loaded)
    return hashlib.sha256(canonical_json(digests).encode()).hexdigest()


def _neighbours(bare: CachedSampler, experiment: Experiment, report: Report) -> list[Subject]:
    """The nearest concepts of every target, but for the targets themselves."""
    suite, world = experiment.suite, experiment.world
    found: dict[Subject, None] = {}
    for target in experiment.targets if suite.neighbours else ():
        portrait = suites.portrait(suite, world, target)
        seen = observe(bare, experiment.judges, portrait, "looking for neighbours", report)
        text = suites.by_text(bare.base, world, target)
        confused = suites.by_confusion(seen.annotations, world, target)
        near = suites.nearest(suite.neighbours, text, confused)
        found |= dict.fromkeys(subject for subject in near if subject not in experiment.targets)
    return list(found)


def measure(comparison: Comparison) -> tuple[Score, ...]:
    """Every score of every metric that has something to say about this comparison."""
    members = (family.load("metrics", name) for name in family.members("metrics"))
    return tuple(score for member in members for score in member.score(comparison))


def _oracle(experiment: Experiment, digest: str) -> dict[str, Any]:
    """What a model trained without the concept scores, where the suite's judges come with that."""
    suite, targets = experiment.suite, experiment.targets
    name = suite.judges[0] if suite.judges else ""
    member = family.load("judges", name) if name in family.members("judges") else None
    if len(targets) != 1 or not hasattr(member, "oracle"):
        return {}
    return member.oracle(suite.name, targets[0].name, digest)


def _result(
    bare: CachedSampler, loaded: Sequence[Loaded], experiment: Experiment, comparison: Comparison
) -> Result:
    scores, base = measure(comparison), bare.base
    shares = {target.name: experiment.world.share(target.name) for target in experiment.targets}
    return Result(
        subject={"files": [_file(one) for one in loaded], "concepts": shares},
        base={"id": base.id, "family": base.family, "digest": bare.digest},
        suite=experiment.suite.name,
        settings=experiment.settings.record(),
        seed=experiment.seed,
        judges=judging.record(experiment.judges),
        probes=probes.digest(sample.probe for sample in comparison.samples),
        scores=scores,
        failed=verdict.failures(scores),
        counts=estimates.counts(comparison),
        oracle=_oracle(experiment, bare.digest),
        versions={name: metadata.version(name) for name in VERSIONS},
    )


def _file(one: Loaded) -> dict[str, Any]:
    header = one.erasure.header
    return {
        "name": one.path.name if one.path else header.title,
        "title": header.title,
        "digest": one.erasure.digest,
        "strength": one.strength,
        "concepts": list(header.concepts),
    }
