"""Adversarial tokens in front of the concept's own prompt, found on the erased model by its noise error.

Zhang et al. 2024 (UnlearnDiffAtk): k free tokens as rows w on the probability simplex over the
vocabulary, tokens drawn from w with a straight-through gradient, and
min_w || noise - eps(x_t, t, [w, c]) ||^2, x_0 the base's picture of the prompt, t from 10 to 990 in turn.
Differs: all prompts are searched at once, each with tokens of its own; `taught` has the base's own
estimate for the noise; a form without tokens (`continuous`) moves the embeddings themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.evaluation.probes import STYLE
from conceptzap.redteam import discrete, search
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.carrier import allowed
from conceptzap.redteam.victim import CONTINUOUS, EVADE, STRAIGHT, TRANSFER, Victim
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier, split

PAPER = "2310.11868"
FORMS = (TRANSFER, STRAIGHT, EVADE, CONTINUOUS)
PAPER_SETTINGS = {"rounds": 50, "steps": 40, "lr": 0.01, "taught": False}


@dataclass(frozen=True)
class Config:
    tokens: int = config.tokens(5)  # for styles
    tokens_object: int = config.tokens(3)  # for everything else
    rounds: int = 3  # timesteps, with a try after each
    steps: int = 15  # at each timestep; 40 in the paper
    lr: float = 0.05  # .01 in the paper
    decay: float = 0.1
    taught: bool = True  # towards the base's estimate of the noise, not the noise itself
    evade: float = 0.3


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    clean = victim.remembered(report)  # [n, c, h, w]
    free = cfg.tokens if victim.target.kind == STYLE else cfg.tokens_object
    carrier = Carrier.before(victim.base, victim.prompts, free)
    for form in victim.forms(FORMS):
        yield from _searched(victim, cfg, form, carrier, clean, report)


def _searched(
    victim: Victim, cfg: Config, form: str, carrier: Carrier, clean: Tensor, report: Report
) -> Iterator[Attempt]:
    on, usable = victim.on(form), allowed(victim.base, ())
    seen, wanted = carrier.by(on.base), on.knows.encode(victim.prompts) if cfg.taught else None
    n, shape = len(carrier), (len(carrier), carrier.free, len(usable))
    if form == CONTINUOUS:
        start = {"v": discrete.joined(on, discrete.begin(on, n, carrier.free, usable))}
    else:
        rows = torch.rand(shape, generator=on.generator(-2)) * usable
        start = {"w": discrete.simplex(rows).to(on.base.device)}

    def embedded(v: dict, generator: torch.Generator) -> list[Tensor]:
        return split(on.base, v["v"]) if "v" in v else discrete.sampled(on, v["w"], generator)

    def loss(v: dict, generator: torch.Generator, step: int) -> Tensor:
        cond = seen.states(embedded(v, generator))
        when = _time(on, step // cfg.steps, cfg.rounds)
        t = torch.full((n,), when, device=clean.device)
        error = search.noise_error(on, form, cond, clean, generator, t, wanted)
        return (error + cfg.evade * on.evasion(form, cond)).sum()

    def after(v: dict) -> None:
        if "w" in v:
            v["w"].copy_(discrete.simplex(v["w"].masked_fill(~usable.to(v["w"].device), -1e3)))

    about = ["unlearndiffatk", carrier.free, cfg.evade, cfg.taught]
    for found in search.search(on, form, about, start, loss, search.Pace.of(cfg), report, after):
        yield _read(victim, form, carrier, found)


def _time(victim: Victim, turn: int, turns: int) -> int:
    """Timestep `turn` of `turns`, evenly from early in the noise to late: .01 to .99 of the schedule."""
    return int(len(victim.base.alphas) * (0.01 + 0.98 * (turn + 0.5) / turns))


def _read(victim: Victim, form: str, carrier: Carrier, found: dict[str, Tensor]) -> Attempt:
    if "w" in found:
        ids = found["w"].argmax(-1).cpu()  # [n, k]
        return Attempt(form, "", carrier.texts(ids), cond=carrier.written(ids), found={"tokens": ids})
    free = split(victim.base, found["v"])
    with torch.no_grad():
        return Attempt(form, "", cond=carrier.states(free), found=discrete.kept(free))
