"""The figures that `erase` ends with: the smoke suite, on a base that comes with judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.evaluation import estimates, intervals, probes, suites
from conceptzap.evaluation.cached import CachedSampler, base_digest
from conceptzap.evaluation.comparison import Annotation, Comparison, Sample
from conceptzap.evaluation.observing import observe, pair
from conceptzap.evaluation.verdict import DRAWN
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import Score, Settings
from conceptzap.task import Task

SUITE = "smoke"


def closing(
    base: Base,
    edits: Sequence[Edit],
    task: Task,
    settings: Settings,
    seed: int,
    report: Report | None = None,
) -> dict[str, Score]:
    """The smoke suite's figures on a base whose own judges there are, else {}.

    `leak`: share of pictures of a concept in which either judge still sees it. `object_kept` (styles)
    and `style_kept` (objects): of those pictures, the share whose other half is still right where
    the base's was. `preservation`: how much of what the judges recognise in the base's other
    pictures they still recognise, same seeds, averaged over labels. `report` is warned of a concept
    that the judges do not know, or the base hardly draws: its figures then say nothing.
    """
    suite, world = suites.load(SUITE)
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
    before, after = (
        observe(CachedSampler(base, settings, under, digest=digest), judges, asked, label, report)
        for under, label in (((), "drawing with the base"), (edits, "drawing without the concept"))
    )
    comparison = pair(asked, before, after, targets)
    _warn_of_undrawn(base, comparison, report)
    return _scores(comparison)


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
