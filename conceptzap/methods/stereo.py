"""STEREO: first search thoroughly for what brings the concept back, then erase once against all of it.

Srivatsan et al. 2025. Stage 1 alternates, for some rounds, between erasing a little (ESD) and finding soft
tokens v_i behind the concept's prompt that restore it in what was erased (textual inversion). Stage 2 starts
from the base again and erases once,
|| eps_theta(x_t, [c, v_i]) - e ||^2,
e = eps(0) + eta (eps(a) - eps(0)) - eta mean_i (eps([c, v_i]) - eps(0)), 0 the empty prompt,
with the anchors added to the target and all found prompts taken away from it. Differs: the change is
low-rank, the latents are the base's own, a found prompt is a pair of K and V prompts that is fitted to the
base's noise instead of pictures, the plain prompt counts as one of them, and a keep set may hold what stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, objectives
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2408.16807"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn*.to_*"  # all but cross-attention in the paper
    rank: int = 4
    rounds: int = 2  # of stage 1; 4 in the paper
    eta: float = 1.0  # of the target; about 1 to 3 in the paper
    steps: int = 60  # of every training: erasing and finding in each round, and stage 2
    batch: int = 6
    lr: float = 0.003
    found_lr: float = 0.02  # learning rate of what is searched for
    size: int = 4  # soft tokens of a found prompt
    retain: float = 3.0  # weight of the keep set; 0 in the paper
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    names = ", ".join(lesson.concept for lesson in taught)
    forget, keep = (draw(base, taught, cfg, report) for draw in distil.SOURCES)
    empty = base.encode([""])
    found: list[Edit] = []

    def erased(edits: list[Edit], attacks: Sequence[Edit], stage: str) -> None:
        """Train `edits` against the plain prompt and the attacks, one of them a step."""

        def terms(step: int, rows: Batch, stay: Batch) -> distil.Terms:
            every = [[], *([attack] for attack in attacks)]
            nothing = distil.teacher(base, rows, distil.rows(empty, len(rows.x)))
            anchor = distil.teacher(base, rows, rows.anchor)
            seen = [distil.teacher(base, rows, rows.concept, with_) for with_ in every]
            target = composed(nothing, anchor, seen, cfg.eta)
            with_ = every[step % len(every)]
            yield from distil.student(base, [*edits, *with_], rows, rows.concept, target, "erase")
            yield from distil.retain(base, edits, stay, cfg)

        groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
        report.watch(edits)
        distil.optimise(base, task, cfg, report, groups, [forget, keep], terms, stage)

    # 1. search: every round erases some more and finds one more prompt
    searching = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    for number in range(cfg.rounds):
        erased(searching, found, f"erase {number}")
        seed = report.seed + number
        attack = objectives.prompt(base, names, cfg.size, "inmidout", seed, role="attack")

        def terms(_: int, rows: Batch, attack: Edit = attack) -> distil.Terms:
            target = distil.teacher(base, rows, rows.concept)
            yield from distil.student(
                base, [*searching, attack], rows, rows.concept, target, "find", group="found"
            )

        groups = {"found": Group(objectives.parameters([attack]), cfg.found_lr)}
        distil.optimise(base, task, cfg, report, groups, [forget], terms, f"find {number}")
        found.append(still(attack))
    # 2. erase once, from the base
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed + 1)
    erased(edits, found, "once")
    yield from edits


def still(edit: Edit) -> Edit:
    """The same without gradients."""
    return replace(edit, tensors={slot: tensor.detach() for slot, tensor in edit.tensors.items()})


def composed(nothing: Tensor, anchor: Tensor, found: Sequence[Tensor], eta: float) -> Tensor:
    """eps(0) + eta (eps(a) - eps(0)) - eta mean_i (eps(p_i) - eps(0))."""
    away = torch.stack([one - nothing for one in found]).mean(0)
    return nothing + eta * (anchor - nothing) - eta * away
