"""MACE: a closed form for what leaks, one low-rank change a concept, and a closed form that fuses them.

Lu et al. 2024, in three stages:
1. refinement: every token of a concept's prompts but its own becomes what it is beside the anchor;
2. per concept a change D_i of the keys, trained until the region where the concept is drawn
   no longer attends to its words, sum_l || A_l[concept] o M ||^2, at 200 <= t < 400;
3. fusion: one change for all concepts, argmin_D sum_i || (D - D_i) e ||^2 + keep || D p ||^2 over the states
   e of concept i's prompts and p that stay, D = sum_i D_i S_i (sum_i S_i + keep S_p + ridge I)^-1.
Fusion leaves each D_i its `up` and changes its `down`, so ranks add up and nothing else. Differs: values,
which attention does not depend on, are changed by the refinement alone; regions come
from the base's own attention instead of a segmentation model, latents from the base's trajectories
instead of noised pictures; timesteps are uniform within the window; the keep set is the prior of 1 and 3.
Of a list each concept is solved by itself: between 1 and 3 it is trained, which is nearly all of its time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conceptzap.base import CROSS_K, CROSS_KV, Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.runtime import attention
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import attending, closed_form, distil, objectives, subspace
from conceptzap.training.attending import Marked, MarkedLatents
from conceptzap.training.lessons import Lesson, lessons
from conceptzap.training.states import States
from conceptzap.training.train import Group

PAPER = "2403.06135"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    refined: int = 12  # rank of stage 1
    rank: int = 2  # of a concept's change; 1 in the paper
    steps: int = 50  # of each concept; 120 for nudity in the paper
    batch: int = 6
    lr: float = 0.003
    low: int = 200  # timesteps that stage 2 trains on
    high: int = 400  # from `low` on
    region: float = 0.1  # attention, of its largest, that counts as the concept's region
    end: bool = True  # the end of text counts as the concept's words
    ridge: float = 0.05  # of both closed forms
    keep_scale: float = 4.0  # weight of the keep set in both
    keep_prompts: int = 400  # prompts of the keep set
    trajectories: int = 8  # pictures a concept


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    keep = torch.cat([_states(base, lesson.kept(cfg.keep_prompts)) for lesson in taught])  # [m, d]
    # 1. what a concept leaks into the tokens beside it
    refined = Edit("weight", base.sites(CROSS_KV), refine(base, taught, keep, cfg))
    # 2. attention to its own words
    changes = [_trained(base, task, lesson, refined, cfg, report) for lesson in taught]
    # 3. all changes in one
    grams = [_gram(_states(base, lesson.prompts)) for lesson in taught]
    yield refined
    if told := subspace.pooled_of(base, taught, cfg.keep_prompts):  # of whole prompts: stage 1 is all
        sums = closed_form.Moves.of(told.source, told.target, told.keep)
        weight = closed_form.POOLED_KEEP * cfg.keep_scale
        pair = closed_form.solve(sums, rank=cfg.refined, ridge=cfg.ridge, keep_scale=weight)
        yield closed_form.at_pooled(base, pair)
    for site in zip(*changes, strict=True):
        yield replace(site[0], tensors=fuse([edit.tensors for edit in site], grams, _gram(keep), cfg))


def _states(base: Base, prompts: Sequence[str]) -> Tensor:
    return States.of(base, prompts).hidden.flatten(0, 1).double()


def _gram(states: Tensor) -> Tensor:
    """Mean of c c^T over states [n, d], [d, d]."""
    return states.T @ states / max(len(states), 1)


def refine(base: Base, taught: Sequence[Lesson], keep: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The pair that takes concepts out of the tokens behind their words; their own tokens are left."""
    source, target, stay = [], [], [keep]
    for lesson in taught:
        pairs = [pair for pair in lesson.pairs if lesson.concept in pair.concept]
        read = States.of(base, [prompt for pair in pairs for prompt in (pair.concept, pair.anchor)])
        chunks = closed_form.aligned(base, read, pairs, [lesson.concept], lesson.anchor)
        moved, wanted, prefix = (torch.cat(part) for part in zip(*chunks, strict=True))
        own = attending.marks(base, [pair.concept for pair in pairs], [lesson.concept])
        beside = ~own[own.cumsum(1) > 0].to(moved.device)  # of the tokens from the concept on
        source.append(moved[beside])
        target.append(wanted[beside])
        stay.append(prefix.cpu().double())
    rows = (torch.cat([part.cpu().double() for part in parts]) for parts in (source, target, stay))
    sums = closed_form.Moves.of(*rows)
    return closed_form.solve(sums, rank=cfg.refined, ridge=cfg.ridge, keep_scale=cfg.keep_scale)


def _trained(
    base: Base, task: Task, lesson: Lesson, refined: Edit, cfg: Config, report: Report
) -> list[Edit]:
    """The concept's own change of every key."""
    edits = objectives.low_rank(base, CROSS_K, cfg.rank, report.seed)

    def terms(_: int, rows: Marked) -> distil.Terms:
        inside = attending.region(base, rows, rows.concept, cfg.region)
        with attached(base, [refined, *edits]), attention.captured(base) as taken:
            base.eps(rows.x, rows.t, rows.concept)
            yield "attention", looks(attending.shares(taken, rows.marks), inside), "weights"

    drawn = MarkedLatents.of(base, [lesson], cfg.trajectories, report, end=cfg.end)
    groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
    source = drawn.between(cfg.low, cfg.high)
    report.watch([refined, *edits])
    distil.optimise(base, task, cfg, report, groups, [source], terms, stage=lesson.concept)
    return edits


def looks(shares: Sequence[Tensor], inside: Tensor) -> Tensor:
    """Root mean square attention to the concept within its region [rows, 1, side, side], over layers."""
    layers = []
    for share in shares:
        mask = attending.at_pixels(inside, share.shape[2])[:, None]  # [rows, 1, pixels]
        layers.append((share * mask).pow(2).sum((1, 2)) / (mask.sum((1, 2)) * share.shape[1] + 1e-6))
    return (torch.stack(layers).mean(0) + 1e-12).sqrt().mean()


def fuse(
    changes: Sequence[dict[str, Tensor]], grams: Sequence[Tensor], keep: Tensor, cfg: Config
) -> dict[str, Tensor]:
    """sum_i up_i down_i S_i (sum_i S_i + k S_p + ridge I)^-1 as one `up` and `down`."""
    eye = torch.eye(len(keep), dtype=keep.dtype)
    inverse = torch.linalg.inv(sum(grams) + cfg.keep_scale * keep + cfg.ridge * eye)
    downs = [
        (change["down"].detach().cpu().double() @ gram @ inverse).float()
        for change, gram in zip(changes, grams, strict=True)
    ]
    ups = [change["up"].detach().cpu() for change in changes]
    return {"up": torch.cat(ups, 1), "down": torch.cat(downs)}  # [out, n r], [n r, d]
