"""diversity: how much pictures differ from one another, as a share of the base's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score

DRAWS = 200


def score(comparison: Comparison) -> Iterator[Score]:
    """Mean pairwise classifier-feature distance, erased model over base, on erased and on kept probes.

    One picture for everything has 0. The interval resamples pictures.
    """
    if not comparison.before.shape[1]:
        return
    for name, rows in (("erase", ~comparison.kept_rows), ("keep", comparison.kept_rows)):
        if rows.sum() >= 3:
            yield _ratio(comparison.before[rows], comparison.after[rows], name)


def _ratio(before: np.ndarray, after: np.ndarray, name: str) -> Score:
    apart = [_distances(features) for features in (before, after)]
    rng, count = np.random.default_rng(0), len(before)
    values = []
    for _ in range(DRAWS):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)
        values.append(_mean(apart[1], weights) / max(_mean(apart[0], weights), 1e-9))
    ones = np.ones(count)
    value = _mean(apart[1], ones) / max(_mean(apart[0], ones), 1e-9)
    low, high = np.percentile([*values, value], intervals.LEVELS)
    found = Score("diversity", float(value), float(low), float(high), count, slice=name)
    return intervals.widen(found, (0.0, np.inf))


def _distances(features: np.ndarray) -> np.ndarray:
    squares = (features**2).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * features @ features.T, 0))


def _mean(distances: np.ndarray, weights: np.ndarray) -> float:
    """Mean over pairs of different pictures, each counted as often as it was drawn."""
    pairs = weights.sum() ** 2 - (weights**2).sum()
    return float(weights @ distances @ weights / max(pairs, 1))
