"""Which samples of an evaluation are shown: a few of every slice, with their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conceptzap.evaluation.cached import CachedSampler
from conceptzap.evaluation.comparison import Sample
from conceptzap.evaluation.run import Evaluation
from conceptzap.result import Probe

SHOWN = 8


@dataclass(frozen=True)
class Strip:
    """Same-seed pictures of one slice, uint8 [h, w, 3], before and after, with their samples."""

    slice: str
    samples: tuple[Sample, ...]
    before: tuple[np.ndarray, ...]
    after: tuple[np.ndarray, ...]


def strips(done: Evaluation) -> list[Strip]:
    """Up to eight evenly chosen samples of every slice; the choice does not look at what was seen."""
    chosen = _chosen(done)
    before, after = (_pictures(sampler, done.probes, chosen) for sampler in (done.bare, done.erased))
    result = []
    for name in done.comparison.slices():
        rows = [row for row in chosen if done.probes[row].slice == name]
        samples = tuple(done.comparison.samples[row] for row in rows)
        result.append(
            Strip(name, samples, tuple(before[r] for r in rows), tuple(after[r] for r in rows))
        )
    return result


def _chosen(done: Evaluation) -> list[int]:
    slices: dict[str, list[int]] = {}
    for row, probe in enumerate(done.probes):
        slices.setdefault(probe.slice, []).append(row)
    return [
        rows[index * len(rows) // min(SHOWN, len(rows))]
        for rows in slices.values()
        for index in range(min(SHOWN, len(rows)))
    ]


def _pictures(sampler: CachedSampler, asked: Sequence[Probe], rows: list[int]) -> dict[int, np.ndarray]:
    """Row -> picture; read from the cache, where the evaluation has just put them."""
    wanted, found, start = set(rows), {}, 0
    for members in sampler.groups(asked):
        inside = range(start, start + len(members))
        if wanted & set(inside):
            pictures = sampler.batch(members).pictures
            found |= {row: pictures[row - start] for row in inside if row in wanted}
        start += len(members)
    return found
