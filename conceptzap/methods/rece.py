"""RECE: UCE's closed form, repeated against the embeddings that would bring the concept back.

Gong et al. 2024: with the edited projections W' = W M of all cross-attention keys and values, the state
that best restores the concept's state c is solved for (eq. 9),
c' = argmin sum_l || W'_l c' - W_l c ||^2 + lambda || c' ||^2 = (lambda I + M^T G M)^-1 M^T G c,
G = sum_l W_l^T W_l, and moved to the anchor in turn by the same closed form on W'. Since every round
multiplies the same M, all rounds together stay one low-rank pair for all layers. Differs: as in `uce`
here, all token states from the concept on are moved instead of its last one, the sums are means over
states (lambda is a share of G's mean eigenvalue), and a number of rounds is set instead of chosen by a
detector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from conceptzap.training.states import once

PAPER = "2407.12383"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    rank: int = 12  # of the first edit
    ridge: float = 0.05  # of the closed forms
    keep_scale: float = 4.0  # weight of the keep set
    keep_prompts: int = 400  # prompts of the keep set
    rounds: int = 2  # derived embeddings; 1 for artists, 3 to 5 for the rest in the paper
    more_rank: int = 6  # of each round's edit
    restoring: float = 0.1  # lambda of c'; .001 to 2 in the paper


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    yield from solved([unsolved(base, task, cfg, report)])[0]


def unsolved(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Unsolved]:
    told = subspace.states_of(base, list(lessons(base, task, report)), cfg.keep_prompts, report)
    pair = _rounds(told.sums, value_gram(base), cfg, cfg.keep_scale)
    yield closed_form.edit_of(base.sites(CROSS_KV), pair)
    if told.pooled:
        weight = closed_form.pooled_weight(base, told.pooled.source.shape[1])
        keep = closed_form.POOLED_KEEP * cfg.keep_scale
        pair = _rounds(told.pooled.sums, weight.T @ weight, cfg, keep)
        yield closed_form.pooled_edit_of(base, pair)


def _rounds(
    sums: Moves, gram: Tensor, cfg: Config, keep_scale: float
) -> Solving[dict[str, Tensor]]:
    """The first closed form and those against what would restore it, as one pair; G is of its readers."""
    rest = {"ridge": cfg.ridge, "keep_scale": keep_scale}
    pair = yield from closed_form.solving(sums, rank=cfg.rank, **rest)
    for _ in range(cfg.rounds):
        back = yield from restoring(pair, gram, cfg.restoring)
        more = yield from closed_form.solving(restored(sums, back), rank=cfg.more_rank, **rest)
        pair = compose(pair, more)
    return pair


def value_gram(base: Base) -> Tensor:
    """G = sum_l W_l^T W_l over all keys and values, [d, d], double, on the CPU; computed once for a list."""

    def summed() -> tuple[Tensor]:
        weights = (base.module(site).weight.detach().cpu().double() for site in base.sites(CROSS_KV))
        return (sum(weight.T @ weight for weight in weights),)

    return once(base, "value gram", summed)[0]


def restoring(pair: dict[str, Tensor], gram: Tensor, share: float) -> Solving[Tensor]:
    """R [d, d], c' = R c: the state that the edited projections turn into what the base makes of c.

    lambda is `share` of G's mean eigenvalue, so that it means the same for any number of layers.
    """
    into, down = pair["into"].cpu().double(), pair["down"].cpu().double()
    eye = torch.eye(len(gram), dtype=gram.dtype)
    m = eye + into @ down  # [d, d]
    lam = share * gram.diagonal().mean()
    return (yield torch.linalg.solve, lam * eye + m.T @ gram @ m, m.T @ gram)


def restored(sums: Moves, back: Tensor) -> Moves:
    """The sums with R c for every state c that moves; what it becomes and what stays is the same."""
    result = replace(sums)
    result.gram = back @ sums.gram @ back.T
    result.cross = (sums.cross + sums.gram) @ back.T - result.gram  # sum (c* - R c) (R c)^T
    result.kept = sums.kept
    return result


def compose(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pair of M1 M2 - I, for pairs of M1 - I and M2 - I: W' = W M1 becomes W' M2.

    (I + A)(I + B) - I = A + B + A B = [into_1 | (I + A) into_2] [down_1; down_2].
    """
    moved = second["into"] + first["into"] @ (first["down"] @ second["into"])
    return {
        "into": torch.cat([first["into"], moved], 1),  # [d, r1 + r2]
        "down": torch.cat([first["down"], second["down"]]),
    }
