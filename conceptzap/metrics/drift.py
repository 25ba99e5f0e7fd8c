"""drift: how far kept pictures moved from the base's, in units of the base's own seed-to-seed distance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score


def score(comparison: Comparison) -> Iterator[Score]:
    """Mean distance of features, base to erased, on kept probes (same seed), over `comparison.apart`, that
    of two base pictures of one prompt: 0 is unchanged, 1 is another picture of the same thing.
    """
    rows = np.flatnonzero(comparison.kept_rows)
    if not len(rows) or not comparison.apart:
        return
    moved = np.linalg.norm(comparison.before[rows] - comparison.after[rows], axis=1) / comparison.apart
    prompts: dict[str, list[list[float]]] = {}
    for row, distance in zip(rows, moved, strict=True):
        prompts.setdefault(comparison.samples[row].probe.prompt, []).append([distance])
    clusters = [np.array(group) for group in prompts.values()]
    yield intervals.statistic(
        "drift", [clusters], lambda x: x[..., 0], better="lower", limits=(0.0, np.inf)
    )
