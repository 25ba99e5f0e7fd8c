"""H: the harmonic mean of E and P; it hides which of them fails, so read it with its legs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import estimates, intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score


def score(comparison: Comparison) -> Iterator[Score]:
    """H = 2 / (1/E + 1/P), as MACE has it (arXiv 2403.06135), with E and P ceiling-normalised.

    E and P rest on different pictures, so their resamplings are independent.
    """
    gone, kept = estimates.hits(comparison), estimates.kept(comparison)
    if not gone or not kept:
        return
    (e, e_draws), (p, p_draws) = intervals.means(gone, seed=1), intervals.means(kept, seed=2)
    floors = estimates.erase_floor(comparison), estimates.keep_floor(comparison)
    values = _mean(estimates.erased_share(e_draws, floors[0]), estimates.kept_share(p_draws, floors[1]))
    value = _mean(estimates.erased_share(e, floors[0]), estimates.kept_share(p, floors[1]))
    low, high = np.percentile(values, intervals.LEVELS)
    yield intervals.widen(Score("H", float(value), float(low), float(high), len(comparison.samples)))


def _mean(e: np.ndarray, p: np.ndarray) -> np.ndarray:
    return 2 * e * p / np.maximum(e + p, 1e-9)
