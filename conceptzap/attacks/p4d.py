"""A prompt that makes the erased model see the noise that the base sees for the concept.

Chin et al. 2024 (Prompting4Debugging): min_p || eps_base(x_t, t, c) - eps(x_t, t, p) ||^2 at random t, p
being free tokens (P4D-N), projected to the nearest tokens with a straight-through gradient. Differs:
all prompts are searched at once, each with tokens of its own; `continuous` leaves the projection out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.redteam import discrete, search
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.carrier import allowed
from conceptzap.redteam.victim import CONTINUOUS, EVADE, STRAIGHT, TRANSFER, Victim
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier, split

PAPER = "2309.06135"
FORMS = (TRANSFER, STRAIGHT, EVADE, CONTINUOUS)
PAPER_SETTINGS = {"rounds": 60, "steps": 50, "lr": 0.1}


@dataclass(frozen=True)
class Config:
    tokens: int = config.tokens(16)  # of the whole prompt
    rounds: int = 3  # tries, one after each round
    steps: int = 12  # of a round; 3000 in all in the paper
    lr: float = 0.1
    decay: float = 0.1
    evade: float = 0.3


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    clean = victim.remembered(report)  # [n, c, h, w]
    carrier = Carrier.alone(victim.base, len(victim.probes), cfg.tokens)
    for form in victim.forms(FORMS):
        yield from _searched(victim, cfg, form, carrier, clean, report)


def _searched(
    victim: Victim, cfg: Config, form: str, carrier: Carrier, clean: Tensor, report: Report
) -> Iterator[Attempt]:
    on, usable = victim.on(form), allowed(victim.base, ())
    seen, asked = carrier.by(on.base), on.knows.encode(victim.prompts)
    start = {"v": discrete.joined(on, discrete.begin(on, len(carrier), cfg.tokens, usable))}

    def loss(v: dict, generator: torch.Generator, step: int) -> Tensor:
        free = v["v"] if form == CONTINUOUS else discrete.projected(on, v["v"], usable)
        cond = seen.states(split(on.base, free))
        t = search.times(on, len(clean), generator).to(clean.device)
        x, _ = on.noised(clean, t, generator)
        with torch.no_grad():
            target = on.knows.eps(x, t, asked)
        error = (on.eps(form, x, t, cond) - target).pow(2).flatten(1).mean(1)
        return (error + cfg.evade * on.evasion(form, cond)).sum()

    about = ["p4d", cfg.tokens, cfg.evade]
    for found in search.search(on, form, about, start, loss, search.Pace.of(cfg), report):
        yield read(victim, form, carrier, found["v"], usable)


def read(victim: Victim, form: str, carrier: Carrier, v: Tensor, usable: Tensor) -> Attempt:
    """What was found: the nearest tokens, or the embeddings as they are."""
    if form != CONTINUOUS:
        ids = discrete.nearest(victim, v, usable).cpu()
        return Attempt(form, "", carrier.texts(ids), cond=carrier.written(ids), found={"tokens": ids})
    free = split(victim.base, v)
    with torch.no_grad():
        return Attempt(form, "", cond=carrier.states(free), found=discrete.kept(free))
