"""95 % intervals: Wilson for plain rates, cluster bootstrap for everything built from them. No torch.

Pictures of one prompt resemble each other, and prompts of one concept do: resampling pictures would
give intervals several times too narrow. So prompts are drawn, and where several concepts stand in
one number, concepts first. Where nothing varies (no leak at all), the bootstrap is blind and
Wilson's bound takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from conceptzap.result import Score, wilson

DRAWS = 4000
LEVELS = (2.5, 97.5)


def rate(metric: str, hits: Sequence[bool], better: str = "higher", slice: str = "") -> Score:
    """A share with Wilson's interval."""
    n, count = len(hits), int(sum(hits))
    low, high = wilson(count, n)
    return Score(metric, count / n if n else 0.0, low, high, n, better, slice)


def _resampled(prompts: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Means of one concept over `DRAWS` resamplings of its prompts: [draws, quantities]."""
    sums = np.stack([prompt.sum(0) for prompt in prompts])
    sizes = np.array([len(prompt) for prompt in prompts], float)
    weights = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), DRAWS)
    return (weights @ sums) / (weights @ sizes)[:, None]


def means(concepts: Sequence[Sequence[np.ndarray]], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Macro-average over concepts of the mean over pictures: the value [q] and draws of it [draws, q].

    `concepts`: concept -> prompt -> array [pictures, q]. One concept: prompts are drawn; several:
    concepts, then prompts (a concept drawn twice shares its prompts, which errs to the wide side).
    """
    rng = np.random.default_rng(seed)
    value = np.mean([np.concatenate(list(prompts)).mean(0) for prompts in concepts], axis=0)
    each = np.stack([_resampled(prompts, rng) for prompts in concepts], 1)  # [draws, concepts, q]
    if len(concepts) == 1:
        return value, each[:, 0]
    count = len(concepts)
    weights = rng.multinomial(count, np.full(count, 1 / count), DRAWS) / count
    return value, np.einsum("dc,dcq->dq", weights, each)


def statistic(
    metric: str,
    concepts: Sequence[Sequence[np.ndarray]],
    of: Callable[[np.ndarray], np.ndarray],
    *,
    better: str = "higher",
    slice: str = "",
    limits: tuple[float, float] = (0.0, 1.0),
) -> Score:
    """A function `of` macro-averages [..., q] -> [...] with its cluster-bootstrap interval."""
    value, draws = means(concepts)
    n = sum(len(prompt) for prompts in concepts for prompt in prompts)
    point = float(of(value))
    low, high = np.percentile(of(draws), LEVELS)
    return widen(Score(metric, point, float(low), float(high), n, better, slice), limits)


def widen(score: Score, limits: tuple[float, float] = (0.0, 1.0)) -> Score:
    """The interval, at least as wide to each side as n pictures without one exception allow."""
    slack = wilson(0, score.n)[1]
    low, high = min(score.low, score.value), max(score.high, score.value)
    if math.isclose(low, high, abs_tol=1e-9):  # sums in another order differ in their last bits
        low, high = low - slack, high + slack
    low, high = max(limits[0], low), min(limits[1], high)
    return Score(score.metric, score.value, low, high, score.n, score.better, score.slice)
