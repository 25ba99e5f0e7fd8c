"""What several metrics share: hit rates by concept and prompt, judges' floors, normalisation. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from conceptzap.evaluation import intervals
from conceptzap.evaluation.comparison import Comparison, Sample
from conceptzap.result import Score

Prompts = list[np.ndarray]  # one array [pictures, quantities] a prompt


def grouped(samples: Iterable[Sample], of: Callable[[Sample], Sequence[float]]) -> Prompts:
    """Quantities of every sample, stacked by prompt."""
    groups: dict[str, list[Sequence[float]]] = {}
    for sample in samples:
        groups.setdefault(sample.probe.prompt, []).append(of(sample))
    return [np.array(rows, float) for rows in groups.values()]


def hits(comparison: Comparison, slice: str = "") -> list[Prompts]:
    """Erased concept -> prompt -> [pictures, 2]: does any judge see it before, after?"""
    result = []
    for kind, name in comparison.targets:
        samples = comparison.erased(name, slice)
        if samples:
            result.append(grouped(samples, lambda c, k=kind, n=name: _seen(c, k, n)))
    return result


def _seen(sample: Sample, kind: str, name: str) -> tuple[bool, bool]:
    depth = sample.depth(kind)
    return sample.before.seen(kind, name, depth), sample.after.seen(kind, name, depth)


def kept(comparison: Comparison, labels: Sequence[tuple[str, str]] | None = None) -> list[Prompts]:
    """Kept label -> prompt -> [pictures, 2]: do all judges see it before, after?"""
    wanted = comparison.kept_labels if labels is None else labels
    return [
        grouped(comparison.asking(kind, name), lambda c, k=kind, n=name: _kept(c, k, n))
        for kind, name in wanted
    ]


def _kept(sample: Sample, kind: str, name: str) -> tuple[bool, bool]:
    depth = sample.depth(kind)
    return sample.before.kept(kind, name, depth), sample.after.kept(kind, name, depth)


def erase_floor(comparison: Comparison) -> float:
    """How often a judge sees an erased concept in the base's pictures of other things (macro)."""
    rates = [
        np.mean([sample.before.seen(kind, name) for sample in comparison.kept])
        for kind, name in comparison.targets
        if comparison.kept
    ]
    return float(np.mean(rates)) if rates else 0.0


def keep_floor(comparison: Comparison) -> float:
    """How often all judges see a kept label in the base's pictures that do not ask for it (macro)."""
    rates = []
    for kind, name in comparison.kept_labels:
        others = [c for c in comparison.kept if c.probe.labels(kind) and name not in c.probe.labels(kind)]
        if others:
            rates.append(np.mean([sample.before.kept(kind, name) for sample in others]))
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


def counts(comparison: Comparison) -> dict[str, list[int]]:
    """Plain numbers of pictures, each as [how many, of how many].

    `drawn`, `gone`: of those that ask for an erased concept, in how many some judge sees it in the
    base's picture, and no judge in the erased model's. `kept`: of the other pictures in which all
    judges see all that the base was asked for, in how many they still do.
    """
    kinds = {name: kind for kind, name in comparison.targets}
    pairs = [_seen(s, kinds[s.probe.concept], s.probe.concept) for s in comparison.erased()]
    right = [after for before, after in map(_all_kept, comparison.kept) if before]
    return {
        "drawn": [sum(before for before, _ in pairs), len(pairs)],
        "gone": [sum(not after for _, after in pairs), len(pairs)],
        "kept": [sum(right), len(right)],
    }


def _all_kept(sample: Sample) -> tuple[bool, bool]:
    """Is everything that a judged sample asked for kept, before and after?"""
    known = [pair for pair in sample.probe.expect if pair[0] in sample.before.labels]
    pairs = [_kept(sample, kind, label) for kind, label in known]
    return (bool(pairs) and all(p[0] for p in pairs), all(p[1] for p in pairs))
