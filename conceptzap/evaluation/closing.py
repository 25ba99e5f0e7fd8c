"""The figures that `erase` ends with: the smoke suite, on a base that comes with judges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.evaluation import estimates, intervals, probes, suites
from conceptzap.evaluation.cached import CachedSampler, acted_on, base_digest
from conceptzap.evaluation.comparison import Annotation, Comparison, Sample
from conceptzap.evaluation.judging import Judge
from conceptzap.evaluation.observing import Observed, observe, pair
from conceptzap.evaluation.probes import Suite
from conceptzap.evaluation.verdict import DRAWN
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import Probe, Score, Settings
from conceptzap.runtime.gates import SIGHT
from conceptzap.task import Task

SUITE = "smoke"
SHOWN = 4  # pictures of the concept, and of the rest, that are shown
NAMED = 4  # concepts that a verdict names


@dataclass(frozen=True)
class Drawn:
    """One prompt and seed drawn by the base and by the erased model, uint8 [h, w, 3] each."""

    prompt: str
    seed: int
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Closing:
    """What is known of an erasure when it is made; all of it empty on a base without judges.

    `scores` by name; `verdict`, the same in one sentence; `concept` and `kept`, a few of the pictures
    that were judged. `shown`: concept -> in how many of how many pictures it still is.
    """

    scores: Mapping[str, Score] = field(default_factory=dict)
    verdict: str = ""
    concept: tuple[Drawn, ...] = ()
    kept: tuple[Drawn, ...] = ()
    shown: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def closing(
    base: Base,
    edits: Sequence[Edit],
    task: Task,
    settings: Settings,
    seed: int,
    report: Report | None = None,
    limit: int | None = None,
) -> Closing:
    """The smoke suite on a base whose own judges there are, with the suite's own number of steps.

    Scores: `leak`, the share of pictures of a concept in which either judge still sees it.
    `object_kept` (styles) and `style_kept` (objects): of those pictures, the share whose other half is
    still right where the base's was. `preservation`: how much of what the judges recognise in the
    base's other pictures they still recognise, same seeds, averaged over labels. `report` is warned
    of a concept that the judges do not know, or the base hardly draws: its figures then say nothing.
    With a `limit` at most so many pictures of a concept are asked for, and of the rest in proportion.
    """
    if limit == 0:
        return Closing()
    suite, world = suites.load(SUITE)
    settings = replace(settings, steps=suite.steps)
    member = family.load("judges", suite.judges[0])
    if not member.fits(base):
        return Closing()
    report = report or Report()
    for concept in (concept for concept in task.concepts if not world.find(concept)):
        report.warn(f"no classifier knows {concept!r}, so nothing says whether it is gone")
    targets = list(dict.fromkeys(filter(None, map(world.find, task.concepts))))
    if not targets:
        return Closing()
    # 1. what to ask for
    asked = probes.expand(_shared(suite, len(targets), limit), world, targets, seed=seed)
    # 2. the base's pictures, then the erased model's
    judges, digest = member.load(base), base_digest(base)
    bare, erased = (CachedSampler(base, settings, under, digest=digest) for under in ((), edits))
    labels = ("drawing with the base", "drawing without the concept")
    if _looking(edits):  # only drawing tells what they open for; what stays shut is the base's own
        after = observe(erased, judges, asked, labels[1], report)
        changed = [row for row, names in enumerate(after.fired) if names]
        before = _observe_again(bare, judges, asked, after, changed, labels[0], report)
    else:
        before = observe(bare, judges, asked, labels[0], report)
        changed = [row for row, acts in enumerate(acted_on(base, edits, asked, settings)) if acts]
        after = _observe_again(erased, judges, asked, before, changed, labels[1], report)
    # 3. what became of it
    comparison = pair(asked, before, after, targets)
    _warn_of_undrawn(base, comparison, report)
    samplers = (erased, bare) if _looking(edits) else (bare, erased)
    drawn = [
        tuple(_drawn(*samplers, asked, changed, _spread(rows), swapped=_looking(edits)))
        for rows in _rows_by_fate(asked)
    ]
    leaks = _leaking(comparison)
    shown = {name: leaks[found.name] for name in task.concepts if (found := world.find(name))}
    return Closing(_scores(comparison), _verdict(comparison), *drawn, shown)


def _shared(suite: Suite, concepts: int, limit: int | None) -> Suite:
    """The suite with its pictures shared among the concepts, at least one of a slice for each.

    With a `limit` at most so many for each, and of the rest as many as go with that.
    """
    erase = {name: max(1, count // concepts) for name, count in suite.erase.items()}
    if limit is None:
        return replace(suite, erase=erase)
    part = min(1.0, limit * concepts / sum(suite.erase.values()))
    keep = _fewer(suite.keep, math.ceil(part * sum(suite.keep.values())))
    return replace(suite, erase=_fewer(suite.erase, min(limit, sum(erase.values()))), keep=keep)


def _fewer(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """At most so many in all, in the same proportions (D'Hondt)."""
    given = dict.fromkeys(counts, 0)
    for _ in range(min(most, sum(counts.values()))):
        given[max(counts, key=lambda name: counts[name] / (given[name] + 1))] += 1
    return {name: count for name, count in given.items() if count}


def _looking(edits: Sequence[Edit]) -> bool:
    """Whether some gate looks at the picture, so that no text says beforehand what is erased."""
    return any(gate.kind == SIGHT for edit in edits for gate in edit.gates)


def _observe_again(
    sampler: CachedSampler,
    judges: Sequence[Judge],
    asked: Sequence[Probe],
    before: Observed,
    changed: Sequence[int],
    label: str,
    report: Report,
) -> Observed:
    """What the judges see of one model: the other's pictures where no edit can act."""
    annotations, features = list(before.annotations), before.features.copy()  # features [n, d]
    fired = [frozenset()] * len(asked)
    if changed:
        new = observe(sampler, judges, [asked[row] for row in changed], label, report)
        features[changed] = new.features
        for row, annotation, names in zip(changed, new.annotations, new.fired, strict=True):
            annotations[row], fired[row] = annotation, names
    return Observed(tuple(annotations), features, tuple(fired))


def _rows_by_fate(asked: Sequence[Probe]) -> tuple[list[int], list[int]]:
    """Rows of the concept's pictures and rows of the others."""
    rows = range(len(asked))
    return [r for r in rows if asked[r].erases], [r for r in rows if not asked[r].erases]


def _spread(rows: Sequence[int]) -> list[int]:
    """At most `SHOWN` rows, evenly over all."""
    count = min(SHOWN, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def _drawn(
    whole: CachedSampler,
    part: CachedSampler,
    asked: Sequence[Probe],
    changed: Sequence[int],
    rows: Sequence[int],
    swapped: bool,
) -> Iterator[Drawn]:
    """Some pictures again, out of the batches that were kept of them.

    `whole` drew all that was asked, `part` what differs; `whole` is the base's sampler unless `swapped`.
    """
    first = _pictures(whole, asked, rows)
    again = [asked[row] for row in changed]
    second = _pictures(part, again, [changed.index(row) for row in rows if row in changed])
    for row in rows:
        probe = asked[row]
        other = second[changed.index(row)] if row in changed else first[row]
        before, after = (other, first[row]) if swapped else (first[row], other)
        yield Drawn(probe.prompt, probe.seed, before, after)


def _pictures(
    sampler: CachedSampler, asked: Sequence[Probe], rows: Sequence[int]
) -> dict[int, np.ndarray]:
    """Row -> picture [h, w, 3], of the batches that hold these rows."""
    found, start = {}, 0
    for group in sampler.groups(asked):
        wanted = [row for row in rows if start <= row < start + len(group)]
        if wanted:
            pictures = sampler.batch(group).pictures  # [n, h, w, 3]
            found |= {row: pictures[row - start] for row in wanted}
        start += len(group)
    return found


def _verdict(comparison: Comparison) -> str:
    """ "Van Gogh is gone from 24 of 24 pictures; 31 of 31 others kept": of what the base drew right."""
    gone = []
    for name, (leaks, n) in _leaking(comparison).items():
        pictures = "" if gone else " pictures"
        gone.append(f"{name} is gone from {n - leaks} of {n}{pictures}")
    if len(gone) > NAMED:
        counts = _leaking(comparison).values()
        gone = [f"{sum(not leaks for leaks, _ in counts)} of {len(gone)} concepts are gone from all pictures"]
    others = [s for s in comparison.kept if _all_right(s, s.before)]
    kept = sum(_all_right(sample, sample.after) for sample in others)
    return f"{', '.join(gone)}; {kept} of {len(others)} others kept"


def _leaking(comparison: Comparison) -> dict[str, tuple[int, int]]:
    """Name of a concept -> the pictures that still show it, and its pictures."""
    found = {name: (kind, comparison.erased(name)) for kind, name in comparison.targets}
    return {
        name: (sum(_leaks(sample, kind) for sample in samples), len(samples))
        for name, (kind, samples) in found.items()
    }


def _all_right(sample: Sample, annotation: Annotation) -> bool:
    kinds = dict.fromkeys(kind for kind, _ in sample.probe.expect)
    return all(_right(sample, kind, annotation) for kind in kinds)


def _warn_of_undrawn(base: Base, comparison: Comparison, report: Report) -> None:
    """Nothing can be taken out of a base that hardly has it, so no leak is no success there."""
    for kind, name in comparison.targets:
        samples = comparison.erased(name)
        shown = sum(sample.before.seen(kind, name, sample.depth(kind)) for sample in samples)
        if shown < DRAWN * len(samples):
            report.warn(
                f"{base.id} itself shows {name!r} in {shown} of {len(samples)} pictures that ask for"
                " it, so there is little to erase"
            )


def _scores(comparison: Comparison) -> dict[str, Score]:
    kinds = {name: kind for kind, name in comparison.targets}
    samples = comparison.erased()
    leaks = [_leaks(sample, kinds[sample.probe.concept]) for sample in samples]
    scores = {"leak": intervals.rate("leak", leaks, "lower")}
    for other in sorted({kind for sample in samples for kind, _ in sample.probe.expect}):
        chosen = [s for s in samples if kinds[s.probe.concept] != other and _right(s, other, s.before)]
        if chosen:
            right = [_right(sample, other, sample.after) for sample in chosen]
            scores[f"{other}_kept"] = intervals.rate(f"{other}_kept", right)
    scores["preservation"] = intervals.statistic(
        "preservation", estimates.kept(comparison), lambda rates: estimates.kept_share(rates, 0.0)
    )
    return scores


def _leaks(sample: Sample, kind: str) -> bool:
    return sample.after.seen(kind, sample.probe.concept, sample.depth(kind))


def _right(sample: Sample, kind: str, annotation: Annotation) -> bool:
    """Do all judges see every label of a kind that the probe asked for?"""
    wanted = sample.probe.labels(kind)
    return bool(wanted) and all(annotation.kept(kind, label, sample.depth(kind)) for label in wanted)
