"""CASteer: what is drawn is turned away from the concept, wherever a cross-attention shows it.

Gaintseva et al. 2025: a steering vector for every cross-attention and timestep, the unit vector s from the
mean output without the concept to the mean output with it, both over pictures and pixels. While drawing,
every output y that leans to it is reflected, y - beta max(<s, y>, 0) s: with beta = 2 its norm stays, so
that the paper's renormalisation is left out here. No training and no gate: what acts is what is seen.
Differs: vectors are of as many timesteps as trajectories have (50 in the paper), the nearest of which
acts; several concepts add their turns; sites where nothing leans to the vector are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import activations
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Trajectories
from conceptzap.trust import canary

PAPER = "2503.09630"
EDITS = "adapter"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2"  # outputs of cross-attention
    beta: float = 2.0  # 1 removes the direction, 2 reflects it
    trajectories: int = 24  # pictures with the concept, and as many without


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    sites = activations.matching(base, cfg.sites)
    for lesson in lessons(base, task, report):
        means = []
        for pairs in (lesson.pairs, lesson.swapped):
            drawn = Trajectories.of(base, pairs, cfg.trajectories, report)
            means.append(averages(base, drawn, sites, report))
        toward = {site: means[0][site] - means[1][site] for site in sites}
        made = [reflection(site, toward[site], drawn.times, cfg.beta) for site in sites]
        if not (made := canary.acting(base, made, lesson.concept)):
            message = f"no output leans to what {lesson.concept} adds to it"
            raise UsageError(message, "try other sites, or more trajectories")
        yield from made


def averages(
    base: Base, drawn: Trajectories, sites: Sequence[str], report: Report
) -> dict[str, Tensor]:
    """Site -> its mean output over pictures and pixels at every timestep, [times, d]."""
    steps = [
        {site: x.mean((0, 1)) for site, x in found.items()}
        for found in activations.along(base, drawn, sites, report)
    ]
    return {site: torch.stack([step[site] for step in steps]) for site in sites}


def reflection(site: str, toward: Tensor, times: Tensor, beta: float) -> Edit:
    """y - beta max(<s_t, y>, 0) s_t, with s_t the direction `toward` [times, d] at the nearest timestep."""
    vectors = normalize(toward, dim=1)  # [times, d]
    tensors = {
        "down": vectors,
        "up": -beta * vectors.T.contiguous(),
        "gain": torch.eye(len(times)),  # at each timestep its own vector alone
        "times": times.float(),
    }
    return Edit("adapter", (site,), tensors, {"phi": "relu", "reads": "y"})
