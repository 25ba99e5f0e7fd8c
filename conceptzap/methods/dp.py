"""DP: two projections move the concept's states exactly and leave the null space of what stays.

2604.10032 (Double Projections, 2026): with the concept's states C [d, n], their anchors' C*, and U an
orthonormal basis of the space that the keep set's states K do not reach (U^T K = 0),
W' = W (I + (C* - C) X^+ U^T), X = U^T C.
A concept's state is seen through U alone, so it becomes its anchor's, and a kept one is not seen at all.
It is one pair for all keys and values. Differs: U spans the directions in which the keep set has less
than `threshold` of its mean energy, for many kept states leave no exact null space; and X^+ is cut to
the `rank` strongest directions, for there are many states of one concept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.base import CROSS_KV, Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import closed_form, subspace
from conceptzap.training.closed_form import Moves
from conceptzap.training.lessons import lessons
from conceptzap.training.solving import Solving, Unsolved, solved

PAPER = "2604.10032"
EDITS = "weight"
SMALLEST = 1e-12  # energy of a direction of X that is no rounding, of its strongest


@dataclass(frozen=True)
class Config:
    rank: int = 8
    threshold: float = 0.05  # energy of a direction that counts as null, of the keep set's mean
    keep_prompts: int = 200  # prompts of the keep set


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    yield from solved([unsolved(base, task, cfg, report)])[0]


def unsolved(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Unsolved]:
    told = subspace.states_of(base, list(lessons(base, task, report)), cfg.keep_prompts, report)
    yield closed_form.edit_of(base.sites(CROSS_KV), _pair(told.sums, cfg))
    if told.pooled:
        yield closed_form.pooled_edit_of(base, _pair(told.pooled.sums, cfg))


def _pair(sums: Moves, cfg: Config) -> Solving[dict[str, Tensor]]:
    null = yield from subspace.null_space(sums.kept, cfg.threshold)
    pair = yield from double_projection(sums, null, cfg.rank)
    return {slot: tensor.float().contiguous() for slot, tensor in pair.items()}


def double_projection(sums: Moves, null: Tensor, rank: int) -> Solving[dict[str, Tensor]]:
    """`into` [d, r] and `down` [r, d] of (C* - C) X^+ U^T, X^+ cut to its r strongest directions.

    With X X^T = V S^2 V^T, X^+ U^T is C^T (U V) S^-2 (U V)^T: sums over the states are enough.
    """
    values, vectors = yield torch.linalg.eigh, null.T @ sums.gram @ null  # [k], [k, k], ascending
    r = min(rank, int((values > SMALLEST * values[-1]).sum()))
    down = (null @ vectors[:, len(values) - r :].flip(1)).T  # [r, d]
    return {"into": sums.cross @ down.T / values.flip(0)[:r], "down": down}
