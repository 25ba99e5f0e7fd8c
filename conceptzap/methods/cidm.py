"""CIDM: concepts one after another, each change orthogonal to those that are there, let in by the prompt.

Dong et al. 2024, from customisation turned to erasing: a low-rank change is learned while the files it comes
`--after` are in force, || eps_new(x, c) - eps(x, a) ||^2 + retain || eps_new(x, k) - eps(x, k) ||^2 with eps
the base under those files, + lambda mean |B_old^T B_new|, B the directions that a change adds to a layer's
output; what overlap is left at the end is projected out. Elastic aggregation: each change is multiplied by
how near the prompt's tokens come to its concept, to the power 4. Differs: weights are not divided by their
sum, which shares out the whole of it also where no concept is asked for; they begin at an absolute threshold
(`similar`: nothing for what stays, all for the concept), so that a file by itself does what it does in a
stack and files stack in any order. Nearness is a fitted direction's instead of the bare concept's states'.
No concept tokens, and no MSE(B, 1), which keeps a customised weight large; the text encoder stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.runtime.attach import installed, installed_on
from conceptzap.task import Task
from conceptzap.training import distil, lessons, objectives, subspace
from conceptzap.training.lessons import Lesson
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2410.17594"
EDITS = "weight, gated"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_*"  # every attention in the paper, and the text encoder's
    rank: int = 4
    orthogonal: float = 0.1  # lambda
    steps: int = 100
    batch: int = 6
    lr: float = 0.002  # 1e-4 in the paper
    retain: float = 3.0  # weight of the keep set; 0 in the paper
    trajectories: int = 16
    gate: bool = True  # elastic aggregation; False acts on every prompt alike
    power: float = 4.0  # of nearness, by which the change is multiplied
    keep_prompts: int = 400  # prompts that the gate stays shut for
    directions: int = 2  # of the gate's detector


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    made: list[Edit] = []
    with ExitStack() as stack:
        for lesson in lessons.lessons(base, task, report):
            one = _after(base, task, lesson, cfg, report)
            stack.enter_context(installed(base, one))
            made += one
    yield from made


def _after(base: Base, task: Task, lesson: Lesson, cfg: Config, report: Report) -> list[Edit]:
    """One concept's edits, beside all that are in force by then."""
    edits, before = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed), installed_on(base)
    taken = {site: subspace.outputs(base, before, site) for edit in edits for site in edit.sites}

    def terms(_: int, forget: Batch, keep: Batch) -> distil.Terms:
        target = distil.teacher(base, forget, forget.anchor)
        yield from distil.student(base, edits, forget, forget.concept, target, "erase")
        yield from distil.retain(base, edits, keep, cfg)
        if cfg.orthogonal and any(basis.shape[1] for basis in taken.values()):
            yield "overlap", cfg.orthogonal * overlap(edits, taken), "weights"

    groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
    sources = [draw(base, [lesson], cfg, report) for draw in distil.SOURCES]
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms, lesson.concept)
    gates = ()
    if cfg.gate:
        told = ([lesson], report.seed, cfg.keep_prompts, cfg.directions, cfg.power, report)
        gates = (lessons.near(base, *told),)
    return [replace(apart(edit, taken), gates=gates) for edit in edits]


def overlap(edits: Sequence[Edit], taken: Mapping[str, Tensor]) -> Tensor:
    """Mean over layers of mean |B_old^T B_new|, for orthonormal B_old [out, r]; gradients flow."""
    ups = [(edit.tensors["up"], taken[edit.sites[0]]) for edit in edits]
    return torch.stack([(old.to(up).T @ up).abs().mean() for up, old in ups if old.shape[1]]).mean()


def apart(edit: Edit, taken: Mapping[str, Tensor]) -> Edit:
    """The edit without what it adds along directions that are taken: B - Q Q^T B."""
    old = taken[edit.sites[0]]  # Q [out, r]
    up = edit.tensors["up"].detach().cpu().double()
    left = (up - old @ (old.T @ up)).float()
    return replace(edit, tensors={"up": left, "down": edit.tensors["down"].detach().cpu()})
