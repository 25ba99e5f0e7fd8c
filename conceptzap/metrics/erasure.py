"""E: how much of what the base drew of a concept is gone, 0 to 1, above the classifiers' own floor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import estimates, intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score


def score(comparison: Comparison) -> Iterator[Score]:
    """E = (a0 - a1) / (a0 - floor), a: share of the concept's pictures in which any classifier sees it.

    Overall (macro over concepts), with its two rates, then by slice, then by concept.
    """
    floor = estimates.erase_floor(comparison)
    overall = estimates.hits(comparison)
    if not overall:
        return
    yield _of(overall, floor, "")
    yield estimates.leg("seen before", overall, 0, "higher", "")
    yield estimates.leg("seen after", overall, 1, "lower", "")
    for name in comparison.slices():
        if concepts := estimates.hits(comparison, name):
            yield _of(concepts, floor, name)
    names = [name for _, name in comparison.targets if comparison.erased(name)]
    for name, prompts in zip(names, overall, strict=True):
        yield _of([prompts], floor, f"concept/{name}")


def _of(concepts: list[estimates.Prompts], floor: float, slice: str) -> Score:
    def share(rates: np.ndarray) -> np.ndarray:
        return estimates.erased_share(rates, floor)

    return intervals.statistic("E", concepts, share, slice=slice)
