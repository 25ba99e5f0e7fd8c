"""What was seen: how the judges annotate the same probes, drawn by the base and by the erased model.

One rule for all metrics: a concept is *seen* when any judge ranks it, a label is *kept* when every
judge does. Every picture is in every denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from conceptzap.result import Probe

Ranked = tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """What one judge sees in n pictures.

    `labels`: kind -> the ranked labels of each picture, best first; `scores` runs beside it;
    `valid` [n]: is it a picture at all; `features` [n, d].
    """

    labels: Mapping[str, Sequence[Ranked]]
    scores: Mapping[str, Sequence[tuple[float, ...]]]
    valid: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Annotation:
    """What the whole panel sees in one picture: kind -> one ranking a judge (of those that know it)."""

    labels: Mapping[str, tuple[Ranked, ...]]
    scores: Mapping[str, tuple[tuple[float, ...], ...]]
    valid: bool

    def seen(self, kind: str, label: str, k: int = 1) -> bool:
        """Does any judge have the label among its first k?"""
        return any(label in ranked[:k] for ranked in self.labels.get(kind, ()))

    def first(self, kind: str) -> set[str]:
        """What any judge sees first."""
        return {label for ranked in self.labels.get(kind, ()) for label in ranked[:1]}

    def kept(self, kind: str, label: str, k: int = 1) -> bool:
        """Do all judges (at least one) have the label among their first k?"""
        rankings = self.labels.get(kind, ())
        return bool(rankings) and all(label in ranked[:k] for ranked in rankings)


def annotate(predictions: Sequence[Prediction]) -> tuple[list[Annotation], np.ndarray]:
    """One annotation a picture from all judges' predictions, and their features side by side [n, d].

    Each judge's features are scaled to unit length, so that no judge outweighs another.
    """
    count = len(predictions[0].valid)
    panel = [_annotation(predictions, row) for row in range(count)]
    parts = [_unit(one.features) for one in predictions if one.features.shape[1]]  # each [n, d]
    return panel, np.concatenate(parts, 1) if parts else np.zeros((count, 0), np.float32)


def _annotation(predictions: Sequence[Prediction], row: int) -> Annotation:
    """The annotation of picture `row`."""
    kinds = sorted({kind for prediction in predictions for kind in prediction.labels})
    knowing = {kind: [p for p in predictions if kind in p.labels] for kind in kinds}
    return Annotation(
        {kind: tuple(p.labels[kind][row] for p in judges) for kind, judges in knowing.items()},
        {kind: tuple(p.scores[kind][row] for p in judges) for kind, judges in knowing.items()},
        all(bool(prediction.valid[row]) for prediction in predictions),
    )


def _unit(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(norm, 1e-9)).astype(np.float32)


@dataclass(frozen=True)
class Sample:
    """One probe, seen before (base) and after (erased)."""

    probe: Probe
    before: Annotation
    after: Annotation

    def depth(self, kind: str) -> int:
        """How many labels of a kind the picture should show: that many ranks count as seen."""
        return max(1, len(self.probe.labels(kind)))


@dataclass(frozen=True)
class Comparison:
    """Everything a metric may look at. `targets`: (kind, name) of the erased concepts.

    `before`, `after`: judge features [samples, d]; `identical`: kept samples drawn one by one, bit for bit
    the base's?; `gates`: slice -> per picture, did any gated edit open (empty without gates);
    `apart`: mean feature distance of two base pictures of one prompt (0: not measured).
    """

    samples: tuple[Sample, ...]
    targets: tuple[tuple[str, str], ...]
    before: np.ndarray
    after: np.ndarray
    identical: tuple[bool, ...] = ()
    gates: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    apart: float = 0.0

    def erased(self, name: str = "", slice: str = "") -> list[Sample]:
        """Samples that call for an erased concept (one of them, one slice)."""
        asking = (sample for sample in self.samples if sample.probe.erases)
        return [
            sample
            for sample in asking
            if name in ("", sample.probe.concept) and slice in ("", sample.probe.slice)
        ]

    @cached_property
    def kept(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.probe.erases]

    @cached_property
    def kept_rows(self) -> np.ndarray:
        return np.array([not sample.probe.erases for sample in self.samples], bool)

    @cached_property
    def kept_labels(self) -> list[tuple[str, str]]:
        """Every (kind, label) that some kept probe asks for and some judge can see."""
        pairs = {pair for sample in self.kept for pair in sample.probe.expect}
        return sorted(pair for pair in pairs if any(pair[0] in c.before.labels for c in self.kept))

    def asking(self, kind: str, label: str) -> list[Sample]:
        """Kept samples that should show this label."""
        return [sample for sample in self.kept if (kind, label) in sample.probe.expect]

    def slices(self) -> list[str]:
        return list(dict.fromkeys(sample.probe.slice for sample in self.samples))
