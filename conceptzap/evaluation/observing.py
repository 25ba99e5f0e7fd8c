"""What judges see of probes under one model, and the comparison that comes of pairing two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from conceptzap.edit import Edit
from conceptzap.evaluation.cached import CachedSampler, ahead
from conceptzap.evaluation.comparison import Annotation, Comparison, Sample, annotate
from conceptzap.evaluation.judging import Judge
from conceptzap.evaluation.probes import Subject, seed_of
from conceptzap.report import Report
from conceptzap.result import Probe
from conceptzap.runtime.gates import CONTENT

TWINS = 16  # kept prompts drawn with a second seed, for a unit of distance


@dataclass(frozen=True)
class Observed:
    """What the judges saw of some probes, in order: annotations, features [n, d], edits open for each."""

    annotations: tuple[Annotation, ...]
    features: np.ndarray
    fired: tuple[frozenset[str], ...]


def observe(
    sampler: CachedSampler,
    judges: Sequence[Judge],
    probes: Sequence[Probe],
    label: str,
    report: Report,
) -> Observed:
    """Draw the probes and show them to the judges, one batch at a time."""
    annotations: list[Annotation] = []
    features: list[np.ndarray] = []
    fired: list[frozenset[str]] = []
    ahead([partial(sampler.batch, group) for group in sampler.groups(probes)], label, report)
    for batch in report.count(sampler.batches(probes), sampler.count(probes), label):
        new, vectors = annotate([judge.predict(batch.pictures) for judge in judges])
        annotations += new
        features.append(vectors)  # [batch, d]
        fired += batch.fired
    return Observed(tuple(annotations), np.concatenate(features), tuple(fired))


def pair(
    probes: Sequence[Probe],
    before: Observed,
    after: Observed,
    targets: Sequence[Subject],
    identical: Sequence[bool] = (),
    edits: Sequence[Edit] = (),
    apart: float = 0.0,
) -> Comparison:
    """What metrics read: base and erased model on the same probes."""
    return Comparison(
        tuple(map(Sample, probes, before.annotations, after.annotations)),
        tuple((target.kind, target.name) for target in targets),
        before.features,
        after.features,
        tuple(identical),
        _gates(probes, after, edits),
        apart,
    )


def _gates(
    probes: Sequence[Probe], after: Observed, edits: Sequence[Edit]
) -> dict[str, tuple[bool, ...]]:
    """Slice -> did a gated edit open for each picture; empty where some edit has no gate at all."""
    if not edits or not all(any(g.kind in CONTENT for g in edit.gates) for edit in edits):
        return {}
    opened: dict[str, list[bool]] = {}
    for probe, names in zip(probes, after.fired, strict=True):
        opened.setdefault(probe.slice, []).append(bool(names))
    return {name: tuple(rows) for name, rows in opened.items()}


def identical(
    bare: CachedSampler,
    erased: CachedSampler,
    probes: Sequence[Probe],
    wanted: int,
    report: Report,
) -> tuple[bool, ...]:
    """Are kept pictures bit for bit the base's, drawn one by one? Over `wanted` probes, evenly chosen."""
    chosen = [probes[row] for row in _kept_rows(probes, wanted)]
    one, other = (_single(sampler) for sampler in (bare, erased))
    ahead([partial(each.batch, (probe,)) for each in (one, other) for probe in chosen], "one by one", report)
    return tuple(
        np.array_equal(one.batch((probe,)).pictures, other.batch((probe,)).pictures)
        for probe in report.count(chosen, len(chosen), "one by one")
    )


def apart(
    bare: CachedSampler,
    judges: Sequence[Judge],
    probes: Sequence[Probe],
    before: Observed,
    report: Report,
) -> float:
    """Mean feature distance of the base's kept pictures to its pictures of the same prompts, other seeds."""
    rows = _kept_rows(probes, TWINS)
    if not rows or not before.features.shape[1]:
        return 0.0
    twins = [replace(probes[r], slice="twin", seed=seed_of("twin", probes[r].prompt, 0)) for r in rows]
    other = observe(bare, judges, twins, "drawing other seeds", report).features  # [rows, d]
    return float(np.linalg.norm(before.features[rows] - other, axis=1).mean())


def _kept_rows(probes: Sequence[Probe], wanted: int) -> list[int]:
    """Rows of at most so many kept probes, evenly chosen."""
    kept = [row for row, probe in enumerate(probes) if not probe.erases]
    wanted = min(wanted, len(kept))
    return [kept[index * len(kept) // wanted] for index in range(wanted)]


def _single(sampler: CachedSampler) -> CachedSampler:
    settings = replace(sampler.settings, batch=1)
    return CachedSampler(sampler.base, settings, sampler.edits, sampler.store, sampler.digest, anew=True)
