"""validity: pictures that the classifiers take for pictures at all, as a share of the base's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import estimates, intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score


def score(comparison: Comparison) -> Iterator[Score]:
    """Over all samples, then the erased and the kept ones: noise in place of a concept is no erasure."""
    parts = {"": comparison.samples, "erase": comparison.erased(), "keep": comparison.kept}
    for name, samples in parts.items():
        if samples:
            prompts = estimates.grouped(samples, lambda c: (c.before.valid, c.after.valid))
            yield intervals.statistic("validity", [prompts], _relative, slice=name)


def _relative(rates: np.ndarray) -> np.ndarray:
    return np.clip(rates[..., 1] / np.maximum(rates[..., 0], 1e-9), 0, 1)
