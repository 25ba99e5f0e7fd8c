"""Which samples of an evaluation are shown: a few of every slice, and those that went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from conceptzap.evaluation.cached import CachedSampler
from conceptzap.evaluation.comparison import Sample
from conceptzap.evaluation.run import Evaluation
from conceptzap.result import Probe

SHOWN = 8
LEAKS, BROKEN = "leaks", "broken"


@dataclass(frozen=True)
class Pair:
    """One prompt and seed, drawn by both models: uint8 [h, w, 3] before and after.

    `fault`: `LEAKS` (the concept is still seen), `BROKEN` (a judge no longer sees what was asked
    for) or "".
    """

    sample: Sample
    before: np.ndarray
    after: np.ndarray
    fault: str


@dataclass(frozen=True)
class Strip:
    """One slice: up to eight evenly chosen pairs, and up to eight more of those that went wrong.

    `wrong` of its `total` samples have a fault.
    """

    slice: str
    pairs: tuple[Pair, ...]
    faults: tuple[Pair, ...]
    wrong: int
    total: int

    @property
    def erases(self) -> bool:
        return self.slice.startswith("erase/")


def strips(done: Evaluation) -> list[Strip]:
    """Every slice's strip; the choice of its `pairs` does not look at what was seen."""
    kinds = {name: kind for kind, name in done.comparison.targets}
    faults = [fault(sample, kinds) for sample in done.comparison.samples]
    slices: dict[str, list[int]] = {}
    for row, probe in enumerate(done.probes):
        slices.setdefault(probe.slice, []).append(row)
    chosen = {name: evenly(rows) for name, rows in slices.items()}
    wrong = {name: [row for row in rows if faults[row]] for name, rows in slices.items()}
    more = {name: evenly([r for r in rows if r not in chosen[name]]) for name, rows in wrong.items()}
    wanted = {row for rows in (*chosen.values(), *more.values()) for row in rows}
    before, after = (_pictures(one, done.probes, wanted) for one in (done.bare, done.erased))

    def pairs(rows: Iterable[int]) -> tuple[Pair, ...]:
        samples = done.comparison.samples
        return tuple(Pair(samples[row], before[row], after[row], faults[row]) for row in rows)

    return [
        Strip(name, pairs(chosen[name]), pairs(more[name]), len(wrong[name]), len(rows))
        for name, rows in slices.items()
    ]


def fault(sample: Sample, kinds: dict[str, str]) -> str:
    """What is wrong with an erased picture; `kinds`: erased concept -> its kind."""
    probe = sample.probe
    if probe.erases:
        kind = kinds[probe.concept]
        return LEAKS if sample.after.seen(kind, probe.concept, sample.depth(kind)) else ""
    lost = any(
        sample.before.kept(kind, label, depth) and not sample.after.kept(kind, label, depth)
        for kind, label in probe.expect
        for depth in (sample.depth(kind),)
    )
    return BROKEN if lost else ""


def evenly(rows: Sequence[int]) -> list[int]:
    """At most `SHOWN` of some rows, evenly chosen."""
    count = min(SHOWN, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _pictures(
    sampler: CachedSampler, probes: Sequence[Probe], wanted: set[int]
) -> dict[int, np.ndarray]:
    """Row -> picture; read from the cache, where the evaluation has just put them."""
    found, start = {}, 0
    for members in sampler.groups(probes):
        inside = range(start, start + len(members))
        if wanted & set(inside):
            pictures = sampler.batch(members).pictures  # [n, h, w, 3]
            found |= {row: pictures[row - start] for row in inside if row in wanted}
        start += len(members)
    return found
