"""All but One: the guidance towards the concept becomes the guidance towards its alternative.

Hong, Lee and Woo 2024: only the guidance term g(c) = eps(c) - eps(0) changes, the unconditional score is
pinned, for its drift is what breaks pictures: || g_theta(c) - g(a) ||^2 + pin || eps_theta(0) - eps(0) ||^2.
As a guide, for prompts of the concept: g(p) - g(c) + g(a), where nothing is trained and the pin is
exact. As weights: the loss, low-rank. The paper's code was never published: the loss is read from its
abstract, and its cleaning of given pictures by DDIM inversion is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.runtime import guides
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import distil, lessons, objectives
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2312.12807"
EDITS = "guide, gated"


@dataclass(frozen=True)
class Config:
    form: str = "guide"  # or weights, which are trained and can be exported
    gate: bool = True  # of the guide; False steers every prompt
    directions: int = 2  # of the gate's detector
    keep_prompts: int = 400  # prompts that the gate is shut for
    sites: str = "unet.*.attn2.to_*"  # of the weights, as all that follows
    rank: int = 4
    steps: int = 100
    batch: int = 6
    lr: float = 0.003
    pin: float = 1.0  # weight of the unconditional score
    retain: float = 1.0  # weight of the keep set
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    if cfg.form not in ("guide", "weights"):
        raise UsageError(f"unknown form {cfg.form!r}", "use guide or weights")
    yield from _guides(base, task, cfg, report) if cfg.form == "guide" else _weights(base, task, cfg, report)


def _guides(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    for lesson in lessons.lessons(base, task, report):
        fit = (report.seed, cfg.keep_prompts, cfg.directions)
        gates = (lessons.gate(base, [lesson], *fit, report=report),) if cfg.gate else ()
        yield guides.guide(base, "swap", [lesson.concept, lesson.anchor], {}, gates)


def _weights(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons.lessons(base, task, report))
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    nothing = base.unconditional()

    def terms(step: int, forget: Batch, keep: Batch) -> distil.Terms:
        n = len(forget.x)
        empty = distil.rows(nothing, n)
        # 1. the frozen model's guidance towards the alternative, and its unconditional score
        score = distil.teacher(base, forget, empty)  # [n, c, h, w]
        wanted = distil.teacher(base, forget, forget.anchor) - score
        # 2. the edited model's, from one call
        with attached(base, edits):
            both = Cond.cat([empty, forget.concept])
            without, given = base.eps(forget.x.repeat(2, 1, 1, 1), forget.t.repeat(2), both).chunk(2)
            moved = objectives.distance(base, given - without, wanted, forget.t, "noise")
            pinned = objectives.distance(base, without, score, forget.t, "noise")
            yield "guidance", moved + cfg.pin * pinned, "weights"
        yield from distil.retain(base, edits, keep, cfg)

    sources = [draw(base, taught, cfg, report) for draw in distil.SOURCES]
    groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    yield from edits
