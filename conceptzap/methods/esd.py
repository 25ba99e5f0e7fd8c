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
from conceptzap.training.train import Group, train

PAPER = "2303.07345"


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
    losses = _losses(base, list(lessons(base, task)), edits, cfg, report.seed)
    groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
    session = report.session({**asdict(cfg), "concepts": task.concepts, "anchors": task.anchors})
    for _ in report.progress(train(groups, losses, steps=cfg.steps, session=session)):
        pass
    yield from edits


def _losses(base: Base, told: list[Lesson], edits: list[Edit], cfg: Config, seed: int):
    forget = objectives.Asked.of(
        base, [p for lesson in told for p in lesson.pairs], cfg.trajectories, seed
    )
    retain = objectives.Asked.kept(
        base, [p for lesson in told for p in lesson.keep], cfg.trajectories, seed + 1
    )

    def losses(step: int, part: int, parts: int) -> Generator[tuple[str, Tensor, str], None, None]:
        generator = objectives.step_generator(seed, step)
        one, other = (asked.draw(generator, cfg.batch, part, parts) for asked in (forget, retain))
        with torch.no_grad():
            given, instead = base.eps(one.x, one.t, one.concept), base.eps(one.x, one.t, one.anchor)
            stay = base.eps(other.x, other.t, other.concept) if cfg.retain else None
        target = objectives.negative_guidance(given, instead, cfg.eta)
        with attached(base.unet, edits):
            eps = base.eps(one.x, one.t, one.concept)
            yield "erase", objectives.distance(base, eps, target, one.t, "noise") / parts, "weights"
        if stay is not None:
            with attached(base.unet, edits):
                eps = base.eps(other.x, other.t, other.concept)
                loss = objectives.distance(base, eps, stay, other.t, "noise")
                yield "retain", cfg.retain * loss / parts, "weights"

    return losses
