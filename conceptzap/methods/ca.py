"""Concept Ablation: the concept's prompt is taught to see the noise that the anchor's prompt sees.

Kumari et al. 2023, eq. 4: on noised pictures x_t of the anchor a,
|| eps_theta(x_t, c) - sg[eps_theta(x_t, a)] ||^2 + prior || eps_theta(x_t, a) - eps ||^2,
the student its own teacher (sg: no gradient), the keys and values of cross-attention trained.
Differs: the change is low-rank, the pictures are latents of few sampling steps, the prior's eps is the
noise that the base sees instead of the one that was drawn, and a keep set may hold what stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, objectives
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch, Trajectories
from conceptzap.training.train import Group

PAPER = "2303.13516"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_[kv]"  # K and V; all attention for nudity in the paper
    rank: int = 8
    steps: int = 100
    batch: int = 6
    lr: float = 0.004
    prior: float = 1.0  # weight of the anchor's own pictures
    retain: float = 1.0  # weight of the keep set; 0 in the paper
    trajectories: int = 24  # pictures of the anchor; 200 to 1000 in the paper


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)

    def terms(_: int, drawn: Batch, keep: Batch) -> distil.Terms:
        anchor, concept = drawn.concept, drawn.anchor  # the pictures are the anchor's
        target = distil.teacher(base, drawn, anchor, edits)
        yield from distil.student(base, edits, drawn, concept, target, "erase")
        own = distil.teacher(base, drawn, anchor)
        yield from distil.student(base, edits, drawn, anchor, own, "prior", weight=cfg.prior)
        yield from distil.retain(base, edits, keep, cfg)

    swapped = [lesson.swapped for lesson in taught]
    pictures = distil.Noised.of(base, Trajectories.of_each(base, swapped, cfg.trajectories, report))
    sources = [pictures, distil.kept_latents(base, taught, cfg, report)]
    groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    yield from edits
