"""AdaVD: every value of the text is made orthogonal to the concept's, as much as the two are alike.

Wang et al. 2024, without training: at position j of a cross-attention's values, v_j loses
w_j <v_j, c_j> / <c_j, c_j> c_j with c_j the value of the bare concept's text at that position and
w_j = height sigmoid(slope (cos(v_j, c_j) - shift)); for several concepts the c_j are made orthogonal to each
other first (Gram and Schmidt), position by position. The first position stays. Values are W times the
concept's text states, so that these are all a file holds. Differs: every timestep computes them anew
instead of looking up recorded ones, which do not depend on it; no gate but w.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import activations
from conceptzap.training.lessons import lessons

PAPER = "2412.06143"
EDITS = "adapter"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_v"  # values
    slope: float = 100.0  # of the sigmoid; all three by the paper
    shift: float = 0.93  # likeness from which on a value counts as the concept's
    height: float = 2.0  # 1 takes the concept's part away, 2 turns it over


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    names = [name for lesson in lessons(base, task, report) for name in lesson.names]
    prompt = base.encode(names).states.float().cpu()  # [concepts and synonyms, length, width]
    params = {"phi": "project", "slope": cfg.slope, "shift": cfg.shift, "height": cfg.height}
    yield Edit("adapter", activations.matching(base, cfg.sites), {"prompt": prompt}, params)
