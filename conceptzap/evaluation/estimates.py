"""What several metrics share: hit rates by concept and prompt, judges' floors, normalisation. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from conceptzap.evaluation import intervals
from conceptzap.evaluation.trial import Cell, Trial
from conceptzap.result import Score

Prompts = list[np.ndarray]  # one array [pictures, quantities] a prompt


def grouped(cells: Iterable[Cell], of: Callable[[Cell], Sequence[float]]) -> Prompts:
    """Quantities of every cell, stacked by prompt."""
    groups: dict[str, list[Sequence[float]]] = {}
    for cell in cells:
        groups.setdefault(cell.probe.prompt, []).append(of(cell))
    return [np.array(rows, float) for rows in groups.values()]


def hits(trial: Trial, slice: str = "") -> list[Prompts]:
    """Erased concept -> prompt -> [pictures, 2]: does any judge see it before, after?"""
    result = []
    for kind, name in trial.targets:
        cells = trial.erased(name, slice)
        if cells:
            result.append(grouped(cells, lambda c, k=kind, n=name: _seen(c, k, n)))
    return result


def _seen(cell: Cell, kind: str, name: str) -> tuple[bool, bool]:
    depth = cell.depth(kind)
    return cell.before.seen(kind, name, depth), cell.after.seen(kind, name, depth)


def kept(trial: Trial, labels: Sequence[tuple[str, str]] | None = None) -> list[Prompts]:
    """Kept label -> prompt -> [pictures, 2]: do all judges see it before, after?"""
    wanted = trial.kept_labels if labels is None else labels
    return [
        grouped(trial.asking(kind, name), lambda c, k=kind, n=name: _kept(c, k, n))
        for kind, name in wanted
    ]


def _kept(cell: Cell, kind: str, name: str) -> tuple[bool, bool]:
    depth = cell.depth(kind)
    return cell.before.kept(kind, name, depth), cell.after.kept(kind, name, depth)


def erase_floor(trial: Trial) -> float:
    """How often a judge sees an erased concept in the base's pictures of other things (macro)."""
    rates = [
        np.mean([cell.before.seen(kind, name) for cell in trial.kept])
        for kind, name in trial.targets
        if trial.kept
    ]
    return float(np.mean(rates)) if rates else 0.0


def keep_floor(trial: Trial) -> float:
    """How often all judges see a kept label in the base's pictures that do not ask for it (macro)."""
    rates = []
    for kind, name in trial.kept_labels:
        others = [c for c in trial.kept if c.probe.labels(kind) and name not in c.probe.labels(kind)]
        if others:
            rates.append(np.mean([cell.before.kept(kind, name) for cell in others]))
    return float(np.mean(rates)) if rates else 0.0


def erased_share(rates: np.ndarray, floor: float) -> np.ndarray:
    """(a0 - a1) / (a0 - floor) in 0..1 for [..., (before, after)]; 0 where the base has nothing to erase."""
    room = rates[..., 0] - floor
    return np.where(room > 0, np.clip((rates[..., 0] - rates[..., 1]) / np.maximum(room, 1e-9), 0, 1), 0.0)


def kept_share(rates: np.ndarray, floor: float) -> np.ndarray:
    """(b1 - floor) / (b0 - floor) in 0..1 for [..., (before, after)]; 0 where the base had nothing right."""
    room = rates[..., 0] - floor
    return np.where(room > 0, np.clip((rates[..., 1] - floor) / np.maximum(room, 1e-9), 0, 1), 0.0)


def leg(metric: str, concepts: list[Prompts], column: int, better: str, slice: str) -> Score:
    """One column of hit rates as a macro-average with its interval."""
    return intervals.statistic(metric, concepts, lambda x: x[..., column], better=better, slice=slice)
