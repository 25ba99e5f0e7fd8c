"""The same seeds under more and more of an erasure: how it fades in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conceptzap.evaluation.cached import CachedSampler
from conceptzap.evaluation.run import Evaluation
from conceptzap.page.samples import Pair, Strip
from conceptzap.report import Report

STRENGTHS = (0.0, 0.25, 0.5, 1.0)  # times what was evaluated
PROMPTS = 3
CHEAP = 128 * 128  # pixels of a picture that a CPU draws in no time


@dataclass(frozen=True)
class Fading:
    """One prompt and seed: a picture uint8 [h, w, 3] at each of `STRENGTHS`."""

    pair: Pair
    pictures: tuple[np.ndarray, ...]


def fadings(done: Evaluation, strips: Sequence[Strip], report: Report) -> list[Fading]:
    """A few prompts of the concept, [] where there is no erasure or a picture costs too much."""
    chosen = [strip.pairs[0] for strip in strips if strip.erases and strip.pairs][:PROMPTS]
    if not done.erased.edits or not chosen or not _cheap(done, chosen[0]):
        return []
    probes = tuple(pair.sample.probe for pair in chosen)
    drawn = [
        _at(done, strength).batch(probes).pictures  # [prompts, h, w, 3]
        for strength in report.count(STRENGTHS, len(STRENGTHS), "drawing strengths")
    ]
    return [Fading(pair, tuple(one[row] for one in drawn)) for row, pair in enumerate(chosen)]


def _cheap(done: Evaluation, pair: Pair) -> bool:
    height, width, _ = pair.before.shape
    return height * width <= CHEAP or done.bare.base.device.type == "cuda"


def _at(done: Evaluation, strength: float) -> CachedSampler:
    erased = done.erased
    edits = [edit.scaled(strength) for edit in erased.edits]
    return CachedSampler(erased.base, erased.settings, edits, erased.store, erased.digest)
