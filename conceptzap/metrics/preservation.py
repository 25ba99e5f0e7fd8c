"""P: how much of what the classifiers recognise in the base's other pictures they still recognise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import estimates, intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score


def score(comparison: Comparison) -> Iterator[Score]:
    """P = (b1 - floor) / (b0 - floor), b: share of pictures in which all classifiers see what was asked.

    b is averaged over labels first: a ratio per label would be biased with few pictures and
    undefined where the base fails. Overall with its two rates, by slice, and b1 by label.
    """
    floor = estimates.keep_floor(comparison)
    overall = estimates.kept(comparison)
    if not overall:
        return
    yield _of(overall, floor, "")
    yield estimates.leg("right before", overall, 0, "higher", "")
    yield estimates.leg("right after", overall, 1, "higher", "")
    for name in comparison.slices():
        if labels := _in_slice(comparison, name):
            yield _of(labels, floor, name)
    for (_, label), prompts in zip(comparison.kept_labels, overall, strict=True):
        yield estimates.leg("right before", [prompts], 0, "higher", f"label/{label}")
        yield estimates.leg("right after", [prompts], 1, "higher", f"label/{label}")


def _in_slice(comparison: Comparison, name: str) -> list[estimates.Prompts]:
    samples = tuple(sample for sample in comparison.kept if sample.probe.slice == name)
    part = Comparison(samples, comparison.targets, comparison.before, comparison.after)
    return estimates.kept(part) if samples else []


def _of(labels: list[estimates.Prompts], floor: float, slice: str) -> Score:
    def share(rates: np.ndarray) -> np.ndarray:
        return estimates.kept_share(rates, floor)

    return intervals.statistic("P", labels, share, slice=slice)
