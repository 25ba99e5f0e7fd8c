"""drift: how far kept pictures moved from the base's, in units of the base's own seed-to-seed distance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap import intervals
from conceptzap.result import Score
from conceptzap.trial import Trial


def score(trial: Trial) -> Iterator[Score]:
    """Mean judge-feature distance base to erased on kept probes (same seed), over the mean distance of
    two base pictures of the same contents: 0 is unchanged, 1 is another picture of the same thing.
    """
    rows = np.flatnonzero(trial.kept_rows)
    pairs = _twins(trial, rows)
    if not len(pairs) or not trial.before.shape[1]:
        return
    moved = np.linalg.norm(trial.before[rows] - trial.after[rows], axis=1)
    apart = np.linalg.norm(trial.before[pairs[:, 0]] - trial.before[pairs[:, 1]], axis=1).mean()
    prompts: dict[str, list[list[float]]] = {}
    for row, distance in zip(rows, moved / max(apart, 1e-9), strict=True):
        prompts.setdefault(trial.cells[row].probe.prompt, []).append([distance])
    clusters = [np.array(group) for group in prompts.values()]
    yield intervals.statistic(
        "drift", [clusters], lambda x: x[..., 0], better="lower", limits=(0.0, np.inf)
    )


def _twins(trial: Trial, rows: np.ndarray) -> np.ndarray:
    """Pairs of kept cells that ask for the same labels with different seeds, each cell's next one."""
    groups: dict[tuple, list[int]] = {}
    for row in rows:
        groups.setdefault(trial.cells[row].probe.expect, []).append(int(row))
    pairs = [pair for group in groups.values() for pair in zip(group, group[1:], strict=False)]
    return np.array(pairs, int).reshape(-1, 2)
