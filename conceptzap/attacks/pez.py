"""Hard prompts by gradients through the text encoder alone: tokens that mean what the concept's prompt means.

Wen et al. 2023 (PEZ): max_p cos(f(p), f(c)), the gradient taken at the nearest tokens and applied to the free
embeddings. Differs: f(c) is the text feature of the concept's own prompt, the concept's words are barred.
No diffusion model is in the loop; the erasure is seen by the forms `evade` and `continuous` through its gates
alone, and `straight-through` would be `transfer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.redteam import discrete, search
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.carrier import Carrier, allowed
from conceptzap.redteam.victim import CONTINUOUS, EVADE, TRANSFER, Victim
from conceptzap.report import Report

PAPER = "2302.03668"
FORMS = (TRANSFER, EVADE, CONTINUOUS)
PAPER_SETTINGS = {"rounds": 5, "steps": 600, "tokens": 16}


@dataclass(frozen=True)
class Config:
    tokens: int = 8
    rounds: int = 3
    steps: int = 40  # of a round; 3000 in all in the paper
    lr: float = 0.1
    decay: float = 0.1
    evade: float = 0.3


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    carrier = Carrier.alone(victim.base, len(victim.probes), cfg.tokens)
    usable = allowed(victim.base, victim.words)
    wanted = victim.base.encode(victim.prompts)
    for form in victim.forms(FORMS):
        yield from _searched(victim, cfg, form, carrier, (usable, wanted), report)


def _searched(
    victim: Victim, cfg: Config, form: str, carrier: Carrier, about: tuple, report: Report
) -> Iterator[Attempt]:
    usable, wanted = about
    start = {"v": discrete.joined(victim, discrete.begin(victim, len(carrier), cfg.tokens, usable))}

    def loss(v: dict, generator: torch.Generator, step: int) -> Tensor:
        free = v["v"] if form == CONTINUOUS else discrete.projected(victim, v["v"], usable)
        cond = carrier.states(discrete.split(victim, free))
        return (cfg.evade * victim.evasion(form, cond) - discrete.alike(cond, wanted)).sum()

    key = ["pez", cfg.tokens, cfg.evade]
    for found in search.search(victim, form, key, start, loss, search.Pace.of(cfg), report):
        if form == CONTINUOUS:
            free = discrete.split(victim, found["v"])
            with torch.no_grad():
                yield Attempt(form, "", cond=carrier.states(free), found=discrete.kept(free))
        else:
            ids = discrete.nearest(victim, found["v"], usable).cpu()
            yield Attempt(form, "", carrier.texts(ids), cond=carrier.written(ids), found={"tokens": ids})
