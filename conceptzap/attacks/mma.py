"""Greedy exchange of single tokens, chosen by the text encoder's gradients, until the text means the concept.

Yang et al. 2024 (MMA-Diffusion, text): from random tokens, max_p cos(f(p), f(c)); each step takes the
gradient of the cosine to the one-hot tokens, the best candidates for every place, tries some single
exchanges and keeps the best. The concept's words are barred. Differs: it is searched once more without
that bar; `evade` adds the margins of the erasure's gates; fewer candidates in `quick`.
No diffusion model is in the loop, so `straight-through` is `transfer` unless texts were erased; what is
exchanged are tokens, so there is no `continuous`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.base import Cond
from conceptzap.redteam import discrete
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import EVADE, STRAIGHT, TRANSFER, Tensors, Victim
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier, tables

PAPER = "2311.17516"
FORMS = (TRANSFER, STRAIGHT, EVADE)
PAPER_SETTINGS = {"steps": 1000, "candidates": 512, "tokens": 20, "best": 256}


@dataclass(frozen=True)
class Config:
    tokens: int = config.tokens(12)  # 20 in the paper
    steps: int = 16
    candidates: int = 8  # exchanges that are tried at a step; 512 in the paper
    best: int = 32  # tokens of the largest gradient at each place; 256 in the paper
    evade: float = 0.3


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    carrier = Carrier.alone(victim.base, len(victim.probes), cfg.tokens)
    for form in victim.forms(FORMS, texts=True):
        on = victim.on(form)
        for variant, usable in discrete.vocabularies(victim).items():

            def make(at: slice, on: Victim = on, form: str = form, usable: Tensor = usable) -> Tensors:
                return {"tokens": _searched(on, cfg, form, carrier.by(on.base), usable, at, report)}

            kept = on.in_parts(["mma", form, variant, *vars(cfg).values()], make, form)
            ids = kept["tokens"].cpu()
            shown = carrier.texts(ids)
            yield Attempt(form, variant, shown, cond=carrier.written(ids), found={"tokens": ids})


def _searched(
    victim: Victim, cfg: Config, form: str, carrier: Carrier, usable: Tensor, at: slice, report: Report
) -> Tensor:
    """Tokens [n, k] for these probes."""
    wanted = victim.reads.encode(victim.prompts[at])
    whole = discrete.begin(victim, len(carrier), cfg.tokens, usable)
    ids, carrier, count = whole[at], carrier.rows(at), len(whole)

    def worth(cond: Cond) -> Tensor:
        return discrete.alike(cond, wanted) - cfg.evade * victim.evasion(form, cond)

    best = worth(carrier.written(ids))  # [n]
    for step in report.count(range(cfg.steps), cfg.steps, f"exchanging tokens, {form}"):
        ranked = _ranked(victim, carrier, ids, usable, worth)[..., : cfg.best]  # [n, k, best]
        generator = victim.generator(-4, step)
        kept = ids
        for _ in range(cfg.candidates):
            place = torch.randint(cfg.tokens, (count, 1), generator=generator)[at]
            which = torch.randint(ranked.shape[-1], (count,), generator=generator)[at]
            rows = torch.arange(len(ids))
            changed = ids.scatter(1, place, ranked[rows, place[:, 0], which][:, None])
            value = worth(carrier.written(changed))
            better = (value > best).cpu()
            kept = torch.where(better[:, None], changed, kept)
            best = torch.maximum(best, value)
        ids = kept
    return ids


def _ranked(victim: Victim, carrier: Carrier, ids: Tensor, usable: Tensor, worth: object) -> Tensor:
    """Usable tokens by the gradient of what they are worth at each place, best first: [n, k, vocabulary]."""
    free = [one.requires_grad_() for one in discrete.embedded(victim, ids)]
    gradients = torch.autograd.grad(worth(carrier.states(free)).sum(), free)
    pairs = zip(gradients, tables(victim.base), strict=True)
    gain = sum(gradient @ table.T for gradient, table in pairs).cpu()
    return gain.masked_fill(~usable, -torch.inf).argsort(-1, descending=True)
