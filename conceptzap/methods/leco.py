"""LECO: low-rank attention weights that stand in for the concept's negative guidance.

p1atdev 2023, the form that LoRA trainers ship:
|| eps_theta(x_t, positive) - [eps(x_t, neutral) - g (eps(x_t, positive) - eps(x_t, unconditional))] ||^2
with the anchor's prompt as the neutral one and the empty prompt as the unconditional one. It is ESD's
target where the anchor is empty; where it is not, guidance still starts from the empty prompt.
Differs: x_t from the base's cached trajectories instead of the student's, a keep set may hold what
stays, and the rank is not scaled by an alpha.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, objectives
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2303.07345"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn*.to_*"  # every attention ("lierla")
    rank: int = 4
    guidance: float = 0.3  # g; 1 in the original
    steps: int = 100
    batch: int = 6
    lr: float = 0.002
    retain: float = 3.0  # weight of the keep set; 0 in the original
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    empty = base.encode([""])

    def terms(_: int, forget: Batch, keep: Batch) -> distil.Terms:
        eps = {
            "positive": distil.teacher(base, forget, forget.concept),
            "neutral": distil.teacher(base, forget, forget.anchor),
            "unconditional": distil.teacher(base, forget, distil.rows(empty, len(forget.x))),
        }
        target = negative(**eps, guidance=cfg.guidance)
        yield from distil.student(base, edits, forget, forget.concept, target, "erase")
        yield from distil.retain(base, edits, keep, cfg)

    sources = [draw(base, taught, cfg, report) for draw in distil.SOURCES]
    groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    yield from edits


def negative(
    positive: Tensor, neutral: Tensor, unconditional: Tensor, guidance: float
) -> Tensor:
    """What is drawn instead: the neutral prompt, away from the concept by g."""
    return neutral - guidance * (positive - unconditional)
