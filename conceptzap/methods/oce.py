"""OCE: the values of every layer are turned, never stretched: a closed-form rotation that erases.

Sun et al. 2026: W' = P W with P orthogonal, so that lengths and angles between neurons stay. P is the polar
factor U V^T of M = U S V^T, which maximises tr(P^T M) (orthogonal Procrustes),
M = -e (I - G*) G + k W C W^T + lambda W W^T,
G and G* projectors on the values of the concept's states and of its anchors', C the mean c c^T of states
that stay: what belongs to the concept and not to its anchor is turned away, all else is held. Differs:
the terms are brought to the same mean eigenvalue, subspaces are the strongest directions of many
states, and P W - W is cut to `rank` for the states at hand, so what is stored is a rotation nearly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import closed_form, subspace
from conceptzap.training.lessons import lessons
from conceptzap.training.solving import Solving, Unsolved, solved

PAPER = "2605.28902"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_v"  # values
    rank: int = 8
    directions: int = 4  # of the subspaces of concept and anchor, a concept
    erase: float = 10.0  # weight e of turning away
    keep: float = 1.0  # weight k of what stays
    whole: float = 0.1  # weight lambda of the layer as it is
    keep_prompts: int = 400  # prompts of what stays


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    yield from solved([unsolved(base, task, cfg, report)])[0]


def unsolved(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Unsolved]:
    taught = list(lessons(base, task, report))
    told = subspace.states_of(base, taught, cfg.keep_prompts, report)
    count = cfg.directions * len(taught)
    yield _edits(base, Grams.of(told), count, cfg)
    if told.pooled:
        weight = closed_form.pooled_weight(base, told.pooled.source.shape[1])
        turned = _turned(Grams.of(told.pooled), weight, count, cfg)
        yield closed_form.pooled_edit_of(base, turned)


def _edits(base: Base, told: Grams, count: int, cfg: Config) -> Unsolved:
    """Layer by layer, for the matrices of all layers at once take gigabytes."""
    made = []
    for site in base.sites(cfg.sites):
        weight = base.module(site).weight.detach().cpu().double()
        made += yield from closed_form.edit_of((site,), _turned(told, weight, count, cfg))
    return made


class Grams(NamedTuple):
    """Sums c c^T [d, d] over the states that go, over those they become, and the mean over what stays."""

    source: Tensor
    target: Tensor
    keep: Tensor

    @staticmethod
    def of(told: subspace.States) -> Grams:
        source, target, keep = (states.T @ states for states in (told.source, told.target, told.keep))
        return Grams(source, target, keep / len(told.keep))


def _turned(told: Grams, weight: Tensor, count: int, cfg: Config) -> Solving[dict[str, Tensor]]:
    """What turns the values of a layer [out, d]: `up` [out, r] and `down` [r, d]."""
    gone = yield from projector(weight @ told.source @ weight.T, count)
    instead = yield from projector(weight @ told.target @ weight.T, count)
    turn = yield from rotation(weight, gone, instead, told.keep, cfg)
    change = (turn - torch.eye(len(turn)).to(turn)) @ weight
    pair = yield from subspace.cut(change, told.source, cfg.rank)
    return {"up": pair["into"], "down": pair["down"]}


def projector(gram: Tensor, count: int) -> Solving[Tensor]:
    """On the `count` strongest directions of values, by their sum v v^T: [out, out]."""
    _, vectors = yield torch.linalg.eigh, gram
    strongest = vectors[:, -count:]
    return strongest @ strongest.T


def rotation(
    weight: Tensor, gone: Tensor, instead: Tensor, gram: Tensor, cfg: Config
) -> Solving[Tensor]:
    """P [out, out], orthogonal, the polar factor of M."""
    eye = torch.eye(len(weight), dtype=weight.dtype)
    stay, whole = (scaled(one) for one in (weight @ gram @ weight.T, weight @ weight.T))
    m = -cfg.erase * (eye - instead) @ gone + cfg.keep * stay + cfg.whole * whole
    u, _, vh = yield torch.linalg.svd, m
    return u @ vh


def scaled(matrix: Tensor) -> Tensor:
    """With a mean eigenvalue of 1."""
    return matrix / matrix.diagonal().mean().clamp_min(1e-12)
