"""ESD: trained cross-attention weights that steer away from the concept by negative guidance.

Gandikota et al. 2023, eq. 5: || eps_theta(x_t, c) - [eps(x_t, a) - eta (eps(x_t, c) - eps(x_t, a))] ||^2,
x_t from the frozen base's partial sampling, a the anchor (the empty prompt in the paper). The change
of the weights is low-rank, as in LECO, so that the file stays small.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import objectives
from conceptzap.training.lessons import Lesson, lessons
from conceptzap.training.objectives import Trajectories
from conceptzap.training.train import Group, Losses

PAPER = "2303.07345"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_*"  # ESD-x; "unet.*" is ESD-all
    rank: int = 4
    eta: float = 0.5  # negative guidance; 1 in the paper
    steps: int = 100
    batch: int = 6
    lr: float = 0.002
    retain: float = 4.0  # weight of the keep set; 0 in the paper
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    losses = _losses(base, list(lessons(base, task, report)), edits, cfg, report)
    groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
    about = {**asdict(cfg), "concepts": task.concepts, "anchors": task.anchors}
    report.watch(edits)
    objectives.optimise(
        base, groups, losses, report, steps=cfg.steps, batch=cfg.batch, about=about
    )
    yield from edits


def _losses(
    base: Base, taught: list[Lesson], edits: list[Edit], cfg: Config, report: Report
) -> Losses:
    pairs = [lesson.pairs for lesson in taught]
    keep = [prompt for lesson in taught for prompt in lesson.keep]
    forget = Trajectories.of_each(base, pairs, cfg.trajectories, report)
    retain = Trajectories.kept(base, keep, cfg.trajectories, report) if cfg.retain else None

    def losses(step: int, part: int, parts: int) -> Generator[tuple[str, Tensor, str], None, None]:
        generator = objectives.step_generator(report.seed, step)
        # 1. what the edited model should see in latents of the concept: the frozen one, steered away
        rows = forget.draw(generator, cfg.batch, part, parts)
        with torch.no_grad():
            concept = base.eps(rows.x, rows.t, rows.concept)  # [n, c, h, w]
            anchor = base.eps(rows.x, rows.t, rows.anchor)
        target = objectives.negative_guidance(concept, anchor, cfg.eta)
        with attached(base, edits):
            eps = base.eps(rows.x, rows.t, rows.concept)
            loss = objectives.distance(base, eps, target, rows.t, "noise")
            yield "erase", loss * rows.share, "weights"
        if retain is None:
            return
        # 2. what it should see in latents of the keep set: what the frozen one does
        rows = retain.draw(generator, cfg.batch, part, parts)
        with torch.no_grad():
            target = base.eps(rows.x, rows.t, rows.concept)
        with attached(base, edits):
            eps = base.eps(rows.x, rows.t, rows.concept)
            loss = objectives.distance(base, eps, target, rows.t, "noise")
            yield "retain", cfg.retain * loss * rows.share, "weights"

    return losses
