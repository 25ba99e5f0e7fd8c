"""Zap: learned tokens that erase by themselves, on frozen weights, behind a calibrated gate.

The dual of KPOP's key: the prompt in cross-attention does not give the concept back, it takes it
away. A closed-form edit moves the text states of the concept to the anchor's, and learned K and V
tokens make up what it leaves, by anchor distillation on cached latents (Kumari et al. 2023, eq. 4):
|| eps(x_t, c; edits) - eps(x_t, a) ||^2. A gate on the text states opens both only for rows that
speak of the concept; every other row is bit for bit the base's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit, Gate
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import closed_form, lessons, objectives
from conceptzap.training.lessons import Lesson
from conceptzap.training.objectives import Batch, Trajectories
from conceptzap.training.train import Group

PAPER = "2403.12326"
EDITS = "tokens + weight, gated"


@dataclass(frozen=True)
class Config:
    tokens: int = 8  # learned tokens, one K and one V prompt of this length
    placement: str = "inmidout"  # cross-attentions that get them: mid, midout, inmidout
    steps: int = 40
    batch: int = 8
    lr: float = 0.01
    trajectories: int = 12  # of partial sampling, cached
    rank: int = 4  # of the closed-form edit, at most; 0 leaves it out
    ridge: float = 0.05  # of the mean square of the states
    keep_scale: float = 4.0  # weight of the keep set
    gate: bool = True  # False erases everywhere, for comparison
    directions: int = 2  # of the gate's detector
    keep_prompts: int = 400  # prompts of the keep set


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    for lesson in lessons.lessons(base, task, report):
        fixed, gates = _closed_form(base, lesson, cfg, report)
        learned = objectives.prompt(
            base, lesson.anchor, cfg.tokens, cfg.placement, report.seed, gates=gates
        )
        _distil(base, lesson, cfg, fixed, learned, report)
        yield from (*fixed, learned)


def _closed_form(
    base: Base, lesson: Lesson, cfg: Config, report: Report
) -> tuple[list[Edit], tuple[Gate, ...]]:
    """The closed-form edits and the gates of a concept, fitted on the same states; nothing drawn yet."""
    gates: tuple[Gate, ...] = ()
    if not (cfg.gate or cfg.rank):
        return [], gates
    states = lessons.read(base, lesson, cfg.keep_prompts, report, cfg.gate)
    if cfg.gate:
        told = [lesson]
        gates = (
            lessons.gate(base, told, report.seed, cfg.keep_prompts, cfg.directions, states, report),
        )
    if not cfg.rank:
        return [], gates
    sums = lessons.moves(base, lesson, states, cfg.keep_prompts)
    rest = {"rank": cfg.rank, "ridge": cfg.ridge, "keep_scale": cfg.keep_scale, "gates": gates}
    return closed_form.edits(base, sums, **rest), gates


def _distil(
    base: Base, lesson: Lesson, cfg: Config, fixed: Sequence[Edit], learned: Edit, report: Report
) -> None:
    trajectories = Trajectories.of(base, lesson.pairs, cfg.trajectories, report)
    targets: dict[int, Tensor] = {}  # time -> the frozen base's estimates of all anchors there

    def target(rows: Batch) -> Tensor:
        """What the frozen base sees, asked for the anchors: [n, c, h, w]; all of a time are asked at once."""
        for t in set(rows.t.tolist()) - targets.keys():
            targets[t] = trajectories.estimates(base, t)
        return torch.stack([targets[t][i] for t, i in zip(rows.t.tolist(), rows.which, strict=True)])

    def losses(step: int, part: int, parts: int) -> Generator[tuple[str, Tensor, str], None, None]:
        generator = objectives.step_generator(report.seed, step)
        rows = trajectories.draw(generator, cfg.batch, part, parts)
        wanted = target(rows)
        with attached(base, [*fixed, learned]):
            eps = base.eps(rows.x, rows.t, rows.concept)
            loss = objectives.distance(base, eps, wanted, rows.t, "noise")
            yield "distil", loss * rows.share, "tokens"

    groups = {"tokens": Group(objectives.parameters([learned]), cfg.lr)}
    about = {**asdict(cfg), "concept": lesson.concept, "anchor": lesson.anchor}
    report.watch([*fixed, learned])
    objectives.optimise(
        base, groups, losses, report, steps=cfg.steps, batch=cfg.batch, about=about
    )
