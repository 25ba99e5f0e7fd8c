"""KID: unbiased squared MMD between kept pictures of base and erased model, on the classifiers' features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score

SUBSETS, SIZE, FEWEST = 100, 100, 64


def score(comparison: Comparison) -> Iterator[Score]:
    """Kernel (x.y / d + 1)^3 (Binkowski et al. 2018, eq. 4), x 1000, over 100 random subsets of at
    most 100 pictures a side; the interval is of the subsets. Features are scaled to unit variance.
    """
    before, after = comparison.before[comparison.kept_rows], comparison.after[comparison.kept_rows]
    count = len(before)
    if count < FEWEST or not before.shape[1]:
        return
    scale = max(float(before.std()), 1e-9)
    before, after = before / scale, after / scale
    rng = np.random.default_rng(0)
    size = min(SIZE, count // 2)  # disjoint rows: the pictures are paired, the estimator is not
    values = []
    for _ in range(SUBSETS):
        order = rng.permutation(count)
        values.append(1000 * mmd(before[order[:size]], after[order[size : 2 * size]]))
    low, high = np.percentile(values, intervals.LEVELS)
    yield Score("KID", float(np.mean(values)), float(low), float(high), count, "lower")


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate for features [m, d] and [m, d]; may be below 0."""
    m, d = x.shape
    within = [((a @ a.T) / d + 1) ** 3 for a in (x, y)]
    between = ((x @ y.T) / d + 1) ** 3
    inside = sum((k.sum() - np.trace(k)) / (m * (m - 1)) for k in within)
    return float(inside - 2 * between.mean())
