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
from conceptzap.training.lessons import lessons

PAPER = "2604.10032"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    rank: int = 8
    threshold: float = 0.05  # energy of a direction that counts as null, of the keep set's mean
    keep_prompts: int = 200  # prompts of the keep set


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    told = subspace.states_of(base, list(lessons(base, task, report)), cfg.keep_prompts, report)
    yield Edit("weight", base.sites(CROSS_KV), _pair(told, cfg))
    if told.pooled:
        yield closed_form.at_pooled(base, _pair(told.pooled, cfg))


def _pair(told: subspace.States, cfg: Config) -> dict[str, Tensor]:
    null = subspace.null_space(told.keep, cfg.threshold)
    pair = double_projection(told.source, told.target, null, cfg.rank)
    return {slot: tensor.float().contiguous() for slot, tensor in pair.items()}


def double_projection(source: Tensor, target: Tensor, null: Tensor, rank: int) -> dict[str, Tensor]:
    """`into` [d, r] and `down` [r, d] of (C* - C) X^+ U^T, X^+ cut to its r strongest directions."""
    c, wanted = source.T, target.T  # [d, n]
    u, s, vh = torch.linalg.svd(null.T @ c, full_matrices=False)  # X = u s vh, [k, n]
    r = min(rank, int((s > 1e-10 * s[0]).sum()))
    return {"into": (wanted - c) @ vh[:r].T / s[:r], "down": (null @ u[:, :r]).T}
