"""KPOP: the weights forget while a learnable prompt in cross-attention takes up the knowledge.

Bui et al. 2024. Two steps alternate on latents of the base's own partial sampling:
(a) transfer: fit the prompt p so that the model with it still draws the concept,
    L2 = || eps_theta(x_t, c, p) - eps(x_t, c) ||^2;
(b) removal: change the weights so that the model without it does not,
    L1 = || eps_theta(x_t, c) - [eps(x_t, a) - eta (eps(x_t, c) - eps(x_t, a))] ||^2, plus w L2, plus
    what the keep set draws.
p is a pair of K and V prompts in context space, shared by the cross-attentions of `placement`. The
weights' change is stored low-rank (role erase), the prompt apart (role key): stacking the key
restores the concept. The paper's code takes the losses in x0 space; noise space is the default here.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import objectives
from conceptzap.training.lessons import Lesson, gate, lessons
from conceptzap.training.objectives import Batch, Trajectories
from conceptzap.training.train import Group

PAPER = "2403.12326"
EDITS = "weight; key: tokens, gated"
ORDERS = ("alternate", "sequential")


@dataclass(frozen=True)
class Config:
    size: int = 10  # learned tokens of the prompt
    placement: str = "inmidout"  # mid, midout, inmidout
    sites: str = "unet.*.attn2.to_*"  # weights that forget
    rank: int = 4
    steps: int = 200  # transfers and removals together
    order: str = "alternate"  # or sequential: all removals first, the prompt fitted afterwards
    batch: int = 6
    lr: float = 0.002  # of the weights
    prompt_lr: float = 0.02  # learning rate of the key
    eta: float = 0.25  # negative guidance beyond the anchor; 1 in the paper, whose anchor is empty
    with_prompt: float = 0.3  # weight of L2 in the removal; 0.1 in the paper
    retain: float = 4.0  # weight of the keep set in the removal; 0 in the paper
    space: str = "noise"  # or x0, the form of the paper's code
    gate: bool = True  # the key acts only on prompts of the concept
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    if cfg.order not in ORDERS:
        raise UsageError(f"unknown order {cfg.order!r}", f"use {' or '.join(ORDERS)}")
    taught = list(lessons(base, task, report))
    weights = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    key = _key(base, taught, cfg, report.seed)
    groups = {
        "weights": Group(objectives.parameters(weights), cfg.lr),
        "prompt": Group(objectives.parameters([key]), cfg.prompt_lr),
    }
    losses = _Losses(base, taught, weights, key, cfg, report)
    about = {**asdict(cfg), "concepts": task.concepts, "anchors": task.anchors}
    report.watch(weights)
    objectives.optimise(
        base, groups, losses, report, steps=cfg.steps, batch=cfg.batch, about=about
    )
    yield from (*weights, key)


def _key(base: Base, taught: list[Lesson], cfg: Config, seed: int) -> Edit:
    text = ", ".join(lesson.concept for lesson in taught)
    gates = (gate(base, taught, seed),) if cfg.gate else ()
    return objectives.prompt(base, text, cfg.size, cfg.placement, seed, gates=gates, role="key")


class _Losses:
    """The terms of one step: a transfer or a removal."""

    def __init__(
        self,
        base: Base,
        taught: list[Lesson],
        weights: list[Edit],
        key: Edit,
        cfg: Config,
        report: Report,
    ) -> None:
        self.base, self.weights, self.key, self.cfg = base, weights, key, cfg
        self.seed = report.seed
        pairs = [lesson.pairs for lesson in taught]
        keep = [prompt for lesson in taught for prompt in lesson.keep]
        self.forget = Trajectories.of_each(base, pairs, cfg.trajectories, report)
        self.keep = Trajectories.kept(base, keep, cfg.trajectories, report) if cfg.retain else None

    def removes(self, step: int) -> bool:
        if self.cfg.order == "sequential":
            return step < self.cfg.steps // 2
        return step % 2 == 0

    def __call__(
        self, step: int, part: int, parts: int
    ) -> Generator[tuple[str, Tensor, str], None, None]:
        generator = objectives.step_generator(self.seed, step)
        batch = self.forget.draw(generator, self.cfg.batch, part, parts)
        terms = self._transfer(batch)
        if self.removes(step):
            keep = self.keep and self.keep.draw(generator, self.cfg.batch, part, parts)
            terms = self._removal(batch, keep)
        for name, loss, group in terms:
            yield name, loss * batch.share, group

    def _transfer(self, batch: Batch) -> Generator[tuple[str, Tensor, str], None, None]:
        target = self._frozen(batch.x, batch.t, batch.concept)
        with attached(self.base, [*self.weights, self.key]):
            yield "transfer", self._loss(batch, target), "prompt"

    def _removal(
        self, batch: Batch, keep: Batch | None
    ) -> Generator[tuple[str, Tensor, str], None, None]:
        concept = self._frozen(batch.x, batch.t, batch.concept)  # [n, c, h, w]
        anchor = self._frozen(batch.x, batch.t, batch.anchor)
        target = objectives.negative_guidance(concept, anchor, self.cfg.eta)
        with attached(self.base, self.weights):
            yield "remove", self._loss(batch, target), "weights"
        if self.cfg.with_prompt:
            with attached(self.base, [*self.weights, self.key]):
                yield "with prompt", self.cfg.with_prompt * self._loss(batch, concept), "weights"
        if keep is not None:
            target = self._frozen(keep.x, keep.t, keep.concept)
            with attached(self.base, self.weights):
                yield "retain", self.cfg.retain * self._loss(keep, target), "weights"

    @torch.no_grad()
    def _frozen(self, x: Tensor, t: Tensor, cond) -> Tensor:
        return self.base.eps(x, t, cond)

    def _loss(self, batch: Batch, target: Tensor) -> Tensor:
        eps = self.base.eps(batch.x, batch.t, batch.concept)
        return objectives.distance(self.base, eps, target, batch.t, self.cfg.space)
