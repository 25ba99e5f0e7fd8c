"""UCE: a closed-form edit of all cross-attention keys and values, in seconds.

Gandikota et al. 2024 move the state of a prompt's last subject token; here every token state from
the concept on is moved, for the concept leaks into the words and the padding behind it. The targets
are states of the anchor's prompts, so one low-rank pair serves all layers (eq. 7 with v* = W c*).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from conceptzap.base import CROSS_KV, Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import closed_form, detector
from conceptzap.training.lessons import lessons

PAPER = "2308.14761"


@dataclass(frozen=True)
class Config:
    rank: int = 12  # of the change of the text states
    ridge: float = 0.05  # lambda of eq. 7, for a mean over states
    keep_scale: float = 4.0  # weight of the keep set, eq. 7's s_p
    keep_prompts: int = 400  # prompts of the keep set


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    parts, kept = [], []
    for lesson in lessons(base, task):
        parts.append(closed_form.aligned_states(base, lesson.pairs, lesson.concept, lesson.anchor))
        stay = [*lesson.instead, *lesson.kept(cfg.keep_prompts)]
        kept += [detector.states(base, stay).flatten(0, 1), parts[-1][2]]
    source, target = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    tensors = closed_form.solve(
        source, target, torch.cat(kept), rank=cfg.rank, ridge=cfg.ridge, keep_scale=cfg.keep_scale
    )
    yield Edit("weight", base.sites(CROSS_KV), tensors)
