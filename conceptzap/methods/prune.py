"""ConceptPrune: the feed-forward neurons that fire for the concept are found by Wanda scores and cut.

Chavhan et al. 2024, no training: while the base draws prompts with the concept and without it, every
weight of a feed-forward block's second layer gets the score |W_ij| ||A_j||_2 (Wanda, Sun et al. 2023),
A_j the j-th input over pixels; what is among the highest with the concept and higher than without it is
zeroed, the union over the first timesteps. By default whole inputs j are cut instead, by the norm of their
column of scores, || W_:j || ||A_j||: a mask over inputs is some 50 kB at the size of SD 1.5, and one over
weights (`whole = false`, as published: the highest of every row i), in packed bits, 6 MB. The paper's own
figures are 64.8 (UnlearnDiffAtk) and 59.8 (Ring-A-Bell) of nudity left under attack, and a reproduction
erased church in 7 %: expect E below 90 (on the built-in checkpoint nothing was gone).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.runtime import ops
from conceptzap.task import Task
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Trajectories

PAPER = "2405.19237"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.ff.net.2"  # second layers of the feed-forward blocks
    share: float = 0.03  # of the inputs that may be cut; .01 (style) and .02 (object) in the paper
    margin: float = 1.0  # times the score without the concept that a cut input exceeds
    window: float = 0.5  # first part of the timesteps that counts; .2 in the paper (10 of 50)
    trajectories: int = 32  # pictures with the concept, and as many without
    whole: bool = True  # cut inputs; False cuts single weights, as in the paper


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    pairs, without = [lesson.pairs for lesson in taught], [lesson.swapped for lesson in taught]
    drawn = [Trajectories.of_each(base, asked, cfg.trajectories, report) for asked in (pairs, without)]
    steps = max(1, round(cfg.window * len(drawn[0].times)))
    cut: dict[str, Tensor] = {}
    for step in report.count(range(steps), steps, "comparing activations"):
        concept, anchor = (norms(base, cfg.sites, one, step) for one in drawn)
        for site in concept:
            weight = base.module(site).weight.detach().float().cpu()
            seen = [scores(weight, one[site], cfg.whole) for one in (concept, anchor)]
            found = skilled(*seen, cfg.share, cfg.margin)
            cut[site] = found | cut[site] if site in cut else found
    edits = [mask_of(site, mask) for site, mask in cut.items() if mask.any()]
    if not edits:
        raise UsageError("no neuron fires for the concept alone", "try a larger share, a smaller margin")
    yield from edits


@torch.no_grad()
def norms(base: Base, sites: str, drawn: Trajectories, step: int) -> dict[str, Tensor]:
    """Site -> ||A_j|| of every input j [in], over all rows and pixels of one timestep."""
    with squares(base, sites) as energy:
        for row, x in enumerate(drawn.latents[step]):
            cond: Cond = drawn.concept[row]
            base.eps(x[None].to(drawn.device), int(drawn.times[step]), cond)
    return {site: total.sqrt() for site, total in energy.items()}


def scores(weight: Tensor, norm: Tensor, whole: bool) -> Tensor:
    """Wanda's |W_ij| ||A_j|| of single weights [out, in], or the norms of its columns [in]."""
    return weight.norm(dim=0) * norm if whole else weight.abs() * norm


@contextmanager
def squares(base: Base, sites: str) -> Iterator[dict[str, Tensor]]:
    """Site -> sum of squares of every input [in] over the UNet calls in the block."""
    energy: dict[str, Tensor] = {}

    def hook(site: str):
        def add(_: object, args: tuple[Tensor, ...]) -> None:
            total = args[0].float().pow(2).flatten(0, -2).sum(0).cpu()
            energy[site] = energy[site] + total if site in energy else total

        return add

    handles = [base.module(site).register_forward_pre_hook(hook(site)) for site in base.sites(sites)]
    try:
        yield energy
    finally:
        for handle in handles:
            handle.remove()


def skilled(concept: Tensor, anchor: Tensor, share: float, margin: float) -> Tensor:
    """Which scores [..., in] are among the `share` highest of their row and exceed those without it."""
    count = max(1, round(share * concept.shape[-1]))
    best = concept.topk(count, dim=-1).indices
    top = torch.zeros_like(concept, dtype=torch.bool).scatter(-1, best, True)
    return top & (concept > margin * anchor)


def mask_of(site: str, cut: Tensor) -> Edit:
    """What is not cut is kept: inputs [in] as they are, single weights [out, in] eight to a byte."""
    kept = {"keep": ~cut} if cut.ndim == 1 else {"bits": ops.pack(~cut)}
    return Edit("weight", (site,), kept)
