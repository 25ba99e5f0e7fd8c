"""What judges see of probes under one model, and the trial that comes of pairing two models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conceptzap.edit import Edit
from conceptzap.evaluation.cached import Batch, Painter
from conceptzap.evaluation.judging import Judge
from conceptzap.evaluation.probes import Subject, seed_of
from conceptzap.evaluation.trial import Cell, Trial, View, views
from conceptzap.result import Probe

TWINS = 16  # kept prompts drawn with a second seed, for a unit of distance
# passes items on, counting them for whoever watches: (items, total, label)
Count = Callable[[Iterable[Any], int, str], Iterator[Any]]


def silent(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    yield from items


@dataclass(frozen=True)
class Observed:
    """What the judges saw of some probes, in order: views, features [n, d], edits open for each."""

    views: tuple[View, ...]
    features: np.ndarray
    fired: tuple[frozenset[str], ...]


def observe(
    painter: Painter,
    judges: Sequence[Judge],
    asked: Sequence[Probe],
    label: str = "",
    count: Count = silent,
) -> Observed:
    """Draw the probes and show them to the judges, one batch at a time."""
    seen: list[View] = []
    features: list[np.ndarray] = []
    fired: list[frozenset[str]] = []
    for batch in count(painter.batches(asked), painter.count(asked), label):
        new, vectors = _look(judges, batch)
        seen += new
        features.append(vectors)
        fired += batch.fired
    return Observed(tuple(seen), np.concatenate(features), tuple(fired))


def _look(judges: Sequence[Judge], batch: Batch) -> tuple[list[View], np.ndarray]:
    return views([judge.look(batch.pictures) for judge in judges])


def pair(
    asked: Sequence[Probe],
    before: Observed,
    after: Observed,
    targets: Sequence[Subject],
    identical: Sequence[bool] = (),
    edits: Sequence[Edit] = (),
    apart: float = 0.0,
) -> Trial:
    """The trial that metrics read: base and erased model on the same probes."""
    cells = tuple(map(Cell, asked, before.views, after.views))
    return Trial(
        cells,
        tuple((target.kind, target.name) for target in targets),
        before.features,
        after.features,
        tuple(identical),
        _gates(asked, after, edits),
        apart,
    )


def _gates(
    asked: Sequence[Probe], after: Observed, edits: Sequence[Edit]
) -> dict[str, tuple[bool, ...]]:
    """Slice -> did a gated edit open for each picture; empty where some edit has no gate at all."""
    acting = [edit for edit in edits if edit.scale]
    if not acting or not all(any(g.kind in ("match", "token") for g in edit.gates) for edit in acting):
        return {}
    opened: dict[str, list[bool]] = {}
    for probe, names in zip(asked, after.fired, strict=True):
        opened.setdefault(probe.slice, []).append(bool(names))
    return {name: tuple(rows) for name, rows in opened.items()}


def identical(
    bare: Painter, erased: Painter, asked: Sequence[Probe], wanted: int, count: Count = silent
) -> tuple[bool, ...]:
    """Are kept pictures bit for bit the base's, drawn one by one? Over `wanted` probes, evenly chosen."""
    chosen = [asked[row] for row in _kept_rows(asked, wanted)]
    one, other = (_single(painter) for painter in (bare, erased))
    return tuple(
        np.array_equal(one.batch((probe,)).pictures, other.batch((probe,)).pictures)
        for probe in count(chosen, len(chosen), "one by one")
    )


def apart(
    bare: Painter, judges: Sequence[Judge], asked: Sequence[Probe], before: Observed, count: Count = silent
) -> float:
    """Mean feature distance of the base's kept pictures to its pictures of the same prompts, other seeds."""
    rows = _kept_rows(asked, TWINS)
    if not rows or not before.features.shape[1]:
        return 0.0
    twins = [replace(asked[row], slice="twin", seed=seed_of("twin", asked[row].prompt, 0)) for row in rows]
    other = observe(bare, judges, twins, "drawing other seeds", count).features
    return float(np.linalg.norm(before.features[rows] - other, axis=1).mean())


def _kept_rows(asked: Sequence[Probe], wanted: int) -> list[int]:
    """Rows of at most so many kept probes, evenly chosen."""
    kept = [row for row, probe in enumerate(asked) if not probe.erases]
    wanted = min(wanted, len(kept))
    return [kept[index * len(kept) // wanted] for index in range(wanted)]


def _single(painter: Painter) -> Painter:
    settings = replace(painter.settings, batch=1)
    return Painter(painter.base, settings, painter.edits, painter.store, painter.digest)
