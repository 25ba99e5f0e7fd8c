"""SDD: self-distillation; the concept's prompt learns the student's own picture of the anchor.

Kim et al. 2023: || eps_theta(x_t, c) - sg[eps_theta(x_t, a)] ||^2 with the empty prompt as a; teacher and
student are one model, there is no negative guidance that could overshoot, and what is kept in the end is
the exponential moving average of the weights. Differs: the change is low-rank, x_t comes from the base's
cached trajectories instead of the average's own, the concepts of one call are asked for one by one
instead of joined by commas, and a keep set may hold what stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, objectives
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2307.05977"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_*"
    rank: int = 4
    steps: int = 100
    batch: int = 6
    lr: float = 0.003
    decay: float = 0.95  # of the average, a step; 0.999 over 1500 steps in the paper
    clip: float = 1.0  # norm of the gradient
    retain: float = 1.0  # weight of the keep set; 0 in the paper
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    average = [_copy(base, edit) for edit in edits]
    averaged = 0  # steps whose weights are in the average; a batch cut in parts comes here twice

    def terms(step: int, forget: Batch, keep: Batch) -> distil.Terms:
        nonlocal averaged
        if step > averaged:
            average_in(average, edits, cfg.decay)
        averaged = step
        target = distil.teacher(base, forget, forget.anchor, edits)
        yield from distil.student(base, edits, forget, forget.concept, target, "erase")
        yield from distil.retain(base, edits, keep, cfg)

    sources = [draw(base, taught, cfg, report) for draw in distil.SOURCES]
    groups = {
        "weights": Group(objectives.parameters(edits), cfg.lr, clip=cfg.clip),
        "average": Group(objectives.parameters(average), cfg.lr),  # rests; kept with the checkpoints
    }
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    average_in(average, edits, cfg.decay)
    yield from average


def _copy(base: Base, edit: Edit) -> Edit:
    tensors = {slot: objectives.parameter(t.detach().clone(), base) for slot, t in edit.tensors.items()}
    return replace(edit, tensors=tensors)


@torch.no_grad()
def average_in(average: Sequence[Edit], edits: Sequence[Edit], decay: float) -> None:
    """average <- decay average + (1 - decay) weights, tensor by tensor."""
    for mean, edit in zip(average, edits, strict=True):
        for slot, tensor in edit.tensors.items():
            mean.tensors[slot].lerp_(tensor, 1 - decay)
