"""Teacher and student in one UNet: the base without edits shows what the base under edits should do.

What most trained methods share, so that a method's own file holds its targets and little else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import objectives
from conceptzap.training.lessons import Lesson
from conceptzap.training.objectives import Batch, Trajectories
from conceptzap.training.train import Group

Terms = Iterator[tuple[str, Tensor, str]]  # name, scalar loss, group of parameters


class Source(Protocol):
    """Where the rows of a step come from; all randomness is the generator's, for the whole batch."""

    def draw(self, generator: torch.Generator, batch: int, part: int, parts: int) -> Batch: ...


def concept_latents(
    base: Base, taught: Sequence[Lesson], cfg: Any, report: Report
) -> Trajectories:
    """The base's latents on the way to the concepts' pictures, `cfg.trajectories` of each."""
    return Trajectories.of_each(base, [lesson.pairs for lesson in taught], cfg.trajectories, report)


def kept_latents(base: Base, taught: Sequence[Lesson], cfg: Any, report: Report) -> Trajectories:
    """The same for what must stay."""
    keep = [prompt for lesson in taught for prompt in lesson.keep]
    return Trajectories.kept(base, keep, cfg.trajectories, report)


SOURCES = (concept_latents, kept_latents)


def optimise(
    base: Base,
    task: Task,
    cfg: Any,
    report: Report,
    groups: Mapping[str, Group],
    sources: Sequence[Source],
    terms: Callable[..., Terms],
    stage: str = "",
) -> None:
    """Train `groups` for `cfg.steps` steps of `cfg.batch` rows from each source.

    `terms(step, *batches)` yields (name, loss, group), each loss a mean over the rows it is given.
    """

    def losses(step: int, part: int, parts: int) -> Terms:
        generator = objectives.step_generator(report.seed, step)
        batches = [source.draw(generator, cfg.batch, part, parts) for source in sources]
        for name, loss, group in terms(step, *batches):
            yield name, loss * batches[0].share, group

    about = {**asdict(cfg), "concepts": task.concepts, "anchors": task.anchors, "stage": stage}
    objectives.optimise(
        base, groups, losses, report, steps=cfg.steps, batch=cfg.batch, about=about
    )


@torch.no_grad()
def teacher(base: Base, batch: Batch, cond: Cond, edits: Sequence[Edit] = ()) -> Tensor:
    """The noise [n, c, h, w] that the base sees in the rows; with edits, the student's, as a target."""
    with attached(base, edits):
        return base.eps(batch.x, batch.t, cond)


def student(
    base: Base,
    edits: Sequence[Edit],
    batch: Batch,
    cond: Cond,
    target: Tensor,
    name: str,
    *,
    weight: float = 1.0,
    group: str = "weights",
    space: str = "noise",
) -> Terms:
    """weight * |eps under the edits - target|^2, attached for as long as it is back-propagated."""
    with attached(base, edits):
        eps = base.eps(batch.x, batch.t, cond)
        yield name, weight * objectives.distance(base, eps, target, batch.t, space), group


def retain(base: Base, edits: Sequence[Edit], batch: Batch, cfg: Any) -> Terms:
    """`cfg.retain` times the distance to what the base makes of prompts that stay."""
    if cfg.retain:
        target = teacher(base, batch, batch.concept)
        yield from student(
            base, edits, batch, batch.concept, target, "retain", weight=cfg.retain
        )


def rows(cond: Cond, n: int) -> Cond:
    """The one row of `cond`, n times."""
    return cond[[0] * n]


def mixed(cond: Cond, weights: Tensor) -> Cond:
    """Row i is the sum over k of weights[i, k] times row k of `cond`; gradients reach the weights."""

    def mix(field: Tensor | None) -> Tensor | None:
        if field is None:
            return None
        return torch.einsum("ik,k...->i...", weights.to(field), field)

    return Cond(mix(cond.states), mix(cond.pooled), mix(cond.time_ids))


@dataclass(frozen=True)
class Noised:
    """Pictures x0 [n, c, h, w] of the base with noise of any strength: q(x_t | x0), not a trajectory.

    `low` <= t < `high`; conditions are those of the prompts that the pictures were drawn for.
    """

    base: Base
    pictures: Tensor
    concept: Cond
    anchor: Cond
    low: int = 0
    high: int = 1000

    @staticmethod
    def of(base: Base, drawn: Trajectories, low: int = 0, high: int = 1000) -> Noised:
        return Noised(base, pictures(base, drawn), drawn.concept, drawn.anchor, low, high)

    def draw(self, generator: torch.Generator, batch: int, part: int, parts: int) -> Batch:
        which = torch.randint(len(self.pictures), (batch,), generator=generator)
        t = torch.randint(self.low, self.high, (batch,), generator=generator)
        noise = torch.randn(batch, *self.pictures.shape[1:], generator=generator)
        rows = slice(batch * part // parts, batch * (part + 1) // parts)
        index, t = which[rows].tolist(), t[rows]
        alpha = self.base.alphas.cpu()[t].view(-1, 1, 1, 1)
        x = alpha.sqrt() * self.pictures[index] + (1 - alpha).sqrt() * noise[rows]  # [rows, c, h, w]
        share = len(index) / batch
        return Batch(x.to(self.base.device), t, self.concept[index], self.anchor[index], share)


@torch.no_grad()
def pictures(base: Base, drawn: Trajectories) -> Tensor:
    """x0 [n, c, h, w] of the trajectories, on the CPU, seen from their last latents x at t.

    x0 = (x - sqrt(1 - a) eps) / sqrt(a).
    """
    x, t = drawn.latents[-1], int(drawn.times[-1])
    alpha = base.alphas.cpu()[t]
    rows = [base.eps(x[[i]].to(base.device), t, drawn.concept[i]).cpu() for i in range(len(x))]
    return (x - (1 - alpha).sqrt() * torch.cat(rows)) / alpha.sqrt()
