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

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import closed_form, subspace
from conceptzap.training.lessons import lessons

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
    taught = list(lessons(base, task, report))
    told = subspace.states_of(base, taught, cfg.keep_prompts, report)
    for site in base.sites(cfg.sites):
        weight = base.module(site).weight.detach().cpu().double()
        yield Edit("weight", (site,), _turned(told, weight, len(taught), cfg))
    if told.pooled:
        weight = closed_form.pooled_weight(base, told.pooled.source.shape[1])
        yield closed_form.at_pooled(base, _turned(told.pooled, weight, len(taught), cfg))


def _turned(told: subspace.States, weight: Tensor, concepts: int, cfg: Config) -> dict[str, Tensor]:
    """What turns the values of a layer [out, d]: `up` [out, r] and `down` [r, d]."""
    gram = told.keep.T @ told.keep / len(told.keep)  # [d, d]
    count = cfg.directions * concepts
    gone, instead = (
        projector((states @ weight.T), count) for states in (told.source, told.target)
    )  # [out, out]
    turn = rotation(weight, gone, instead, gram, cfg)
    pair = subspace.cut((turn - torch.eye(len(turn)).to(turn)) @ weight, told.source, cfg.rank)
    return {"up": pair["into"], "down": pair["down"]}


def projector(values: Tensor, count: int) -> Tensor:
    """On the `count` strongest directions of values [n, out]: [out, out]."""
    _, vectors = torch.linalg.eigh(values.T @ values)
    strongest = vectors[:, -count:]
    return strongest @ strongest.T


def rotation(weight: Tensor, gone: Tensor, instead: Tensor, gram: Tensor, cfg: Config) -> Tensor:
    """P [out, out], orthogonal, the polar factor of M."""
    eye = torch.eye(len(weight), dtype=weight.dtype)
    stay, whole = (scaled(one) for one in (weight @ gram @ weight.T, weight @ weight.T))
    u, _, vh = torch.linalg.svd(-cfg.erase * (eye - instead) @ gone + cfg.keep * stay + cfg.whole * whole)
    return u @ vh


def scaled(matrix: Tensor) -> Tensor:
    """With a mean eigenvalue of 1."""
    return matrix / matrix.diagonal().mean().clamp_min(1e-12)
