"""No text at all: a picture of the concept is inverted, and the empty prompt's states are tuned to redraw it.

TINA+ (2026), after null-text inversion (Mokady et al. 2023): x_T from DDIM inversion with fixed-point
correction on the erased model under the empty prompt; then at each step, first to last, states that step
to the inverted trail, min || DDIM(x_t, eps(x_t, t, s_t)) - x*_{t-1} ||^2. No prompt reaches the model,
so no gate on text can see it: whoever holds the weights has this way, and no file can shut it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conceptzap.base import Cond
from conceptzap.redteam import inverting
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import STRAIGHT, Tensors, Victim
from conceptzap.report import Report

PAPER = "2608.17747"
FORMS = (STRAIGHT,)
PAPER_SETTINGS = {"steps": 25, "lr": 0.001}


@dataclass(frozen=True)
class Config:
    steps: int = 4  # of AdamW at each sampling step
    lr: float = 0.005


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    clean = victim.remembered(report)  # [n, c, h, w]
    nothing = victim.base.encode([""]).repeat(len(clean))
    about = ["null-text", "unguided", cfg.steps, cfg.lr, inverting.FIXED_POINT]
    found = victim.in_parts(about, lambda at: _tuned(victim, cfg, clean[at], nothing[at], report))
    states = found["states"].transpose(0, 1)  # [steps, n, 77, d]
    conds = [Cond(one, nothing.pooled, nothing.time_ids) for one in states]
    kept = {"latents": found["noise"], "states": states.half()}  # as much as a picture, for each step
    yield Attempt(STRAIGHT, cond=conds, latents=found["noise"], guidance=1.0, found=kept)


def _tuned(victim: Victim, cfg: Config, clean: Tensor, nothing: Cond, report: Report) -> Tensors:
    trail = inverting.inverted(victim, STRAIGHT, clean, nothing)
    times, alphas = inverting.schedule(victim)
    x, states, found = trail[0], nothing.states, []
    for i in report.count(range(len(times)), len(times), "tuning the empty prompt"):
        value = nn.Parameter(states.detach().clone())
        adam = torch.optim.AdamW([value], lr=cfg.lr, weight_decay=0.0, foreach=False, fused=False)
        t = torch.full((len(x),), times[i], device=x.device)

        def moved(value: Tensor, x: Tensor = x, t: Tensor = t, i: int = i) -> Tensor:
            eps = victim.eps(STRAIGHT, x, t, Cond(value, nothing.pooled, nothing.time_ids), guided=False)
            return inverting.step(eps, x, alphas[i], alphas[i + 1])

        for _ in range(cfg.steps):
            adam.zero_grad(set_to_none=True)
            error = (moved(value) - trail[i + 1]).pow(2).flatten(1).mean(1).sum()
            torch.autograd.backward(error, inputs=[value])
            adam.step()
        states = value.detach()
        with torch.no_grad():
            x = moved(states)
        found.append(states)
    return {"noise": trail[0], "states": torch.stack(found, 1)}  # states [n, steps, 77, d]
