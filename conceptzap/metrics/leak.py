"""Leak@n: the chance that n tries at a prompt give at least one picture with the concept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conceptzap.evaluation import estimates, intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score, wilson

TRIES = (1, 20)


def score(comparison: Comparison) -> Iterator[Score]:
    """Mean over prompts of 1 - (1 - q)^n, q a prompt's share of seeds that leak; macro over concepts.

    With one seed a prompt, q is that of the concept, which can only overstate Leak@20. Where nothing
    leaked, `high` is what that many pictures can exclude: 1 - (1 - u)^n, u Wilson's bound for 0.
    """
    concepts = estimates.hits(comparison)
    if not concepts:
        return
    repeated = any(len(prompt) > 1 for prompts in concepts for prompt in prompts)
    count = sum(len(prompt) for prompts in concepts for prompt in prompts)
    for tries in TRIES:
        if repeated:
            # a prompt is one entry of the average, however many seeds it has
            once = [[_within(prompt, tries) for prompt in prompts] for prompts in concepts]
            found = _rate(f"Leak@{tries}", once, 1)
        else:
            single = [[prompt[:, 1:] for prompt in prompts] for prompts in concepts]
            found = _rate(f"Leak@{tries}", single, tries)
        yield _bounded(found, count, tries)


def _within(prompt: np.ndarray, tries: int) -> np.ndarray:
    return np.array([[1 - (1 - prompt[:, 1].mean()) ** tries]])


def _rate(metric: str, concepts: list[estimates.Prompts], tries: int) -> Score:
    return intervals.statistic(
        metric, concepts, lambda x: 1 - (1 - x[..., 0]) ** tries, better="lower"
    )


def _bounded(score: Score, count: int, tries: int) -> Score:
    bound = 1 - (1 - wilson(0, count)[1]) ** tries
    high = max(score.high, bound) if score.value == 0 else score.high
    return Score(score.metric, score.value, score.low, high, count, score.better)
