"""What was seen: the judges' views of the same probes drawn by the base and by the erased model. No torch.

One rule for all metrics: a concept is *seen* when any judge ranks it, a label is *kept* when every
judge does. Every picture is in every denominator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from conceptzap.result import Probe

Ranked = tuple[str, ...]


@dataclass(frozen=True)
class Sight:
    """What one judge sees in n pictures.

    `labels`: kind -> the ranked labels of each picture, best first; `scores` runs beside it;
    `valid` [n]: is it a picture at all; `features` [n, d].
    """

    labels: Mapping[str, Sequence[Ranked]]
    scores: Mapping[str, Sequence[tuple[float, ...]]]
    valid: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class View:
    """What the whole panel sees in one picture: kind -> one ranking a judge (of those that know it)."""

    labels: Mapping[str, tuple[Ranked, ...]]
    scores: Mapping[str, tuple[tuple[float, ...], ...]]
    valid: bool

    def seen(self, kind: str, label: str, k: int = 1) -> bool:
        """Does any judge have the label among its first k?"""
        return any(label in ranked[:k] for ranked in self.labels.get(kind, ()))

    def kept(self, kind: str, label: str, k: int = 1) -> bool:
        """Do all judges (at least one) have the label among their first k?"""
        rankings = self.labels.get(kind, ())
        return bool(rankings) and all(label in ranked[:k] for ranked in rankings)


def views(sights: Sequence[Sight]) -> tuple[list[View], np.ndarray]:
    """One view a picture from the sights of all judges, and their features side by side [n, d].

    Each judge's features are scaled to unit length, so that no judge outweighs another.
    """
    count = len(sights[0].valid)
    panel = [
        View(
            {kind: tuple(s.labels[kind][i] for s in sights if kind in s.labels) for kind in _kinds(sights)},
            {kind: tuple(s.scores[kind][i] for s in sights if kind in s.labels) for kind in _kinds(sights)},
            all(bool(sight.valid[i]) for sight in sights),
        )
        for i in range(count)
    ]
    parts = [_unit(sight.features) for sight in sights if sight.features.shape[1]]
    return panel, np.concatenate(parts, 1) if parts else np.zeros((count, 0), np.float32)


def _kinds(sights: Sequence[Sight]) -> list[str]:
    return sorted({kind for sight in sights for kind in sight.labels})


def _unit(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(norm, 1e-9)).astype(np.float32)


@dataclass(frozen=True)
class Cell:
    """One probe, seen before (base) and after (erased)."""

    probe: Probe
    before: View
    after: View

    def depth(self, kind: str) -> int:
        """How many labels of a kind the picture should show: that many ranks count as seen."""
        return max(1, len(self.probe.labels(kind)))


@dataclass(frozen=True)
class Trial:
    """Everything a metric may look at. `targets`: (kind, name) of the erased concepts.

    `before`, `after`: judge features [cells, d]; `identical`: kept cells drawn one by one, bit for bit
    the base's?; `gates`: slice -> per picture, did any gated edit open (empty without gates);
    `apart`: mean feature distance of two base pictures of one prompt (0: not measured).
    """

    cells: tuple[Cell, ...]
    targets: tuple[tuple[str, str], ...]
    before: np.ndarray
    after: np.ndarray
    identical: tuple[bool, ...] = ()
    gates: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    apart: float = 0.0

    def erased(self, name: str = "", slice: str = "") -> list[Cell]:
        """Cells that call for an erased concept (one of them, one slice)."""
        return [
            cell
            for cell in self.cells
            if cell.probe.erases and name in ("", cell.probe.concept) and slice in ("", cell.probe.slice)
        ]

    @cached_property
    def kept(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.probe.erases]

    @cached_property
    def kept_rows(self) -> np.ndarray:
        return np.array([not cell.probe.erases for cell in self.cells], bool)

    @cached_property
    def kept_labels(self) -> list[tuple[str, str]]:
        """Every (kind, label) that some kept probe asks for and some judge can see."""
        pairs = {pair for cell in self.kept for pair in cell.probe.expect}
        return sorted(pair for pair in pairs if any(pair[0] in c.before.labels for c in self.kept))

    def asking(self, kind: str, label: str) -> list[Cell]:
        """Kept cells that should show this label."""
        return [cell for cell in self.kept if (kind, label) in cell.probe.expect]

    def slices(self) -> list[str]:
        return list(dict.fromkeys(cell.probe.slice for cell in self.cells))


def by_prompt(cells: Iterable[Cell], values: Iterable[float]) -> list[list[float]]:
    """Values grouped by prompt, the cluster of every interval."""
    groups: dict[str, list[float]] = {}
    for cell, value in zip(cells, values, strict=True):
        groups.setdefault(cell.probe.prompt, []).append(float(value))
    return list(groups.values())
