"""Hard prompts by gradients through the text encoder alone: tokens that mean what the concept's prompt means.

Wen et al. 2023 (PEZ): max_p cos(f(p), f(c)), the gradient taken at the nearest tokens and applied to the free
embeddings, the best tokens of all steps kept. Differs: f(c) is the text feature of the concept's own prompt,
and it is searched twice, with the concept's words barred and without.
No diffusion model is in the loop; the erasure is seen by the forms `evade` and `continuous` through its gates
alone, and `straight-through` is `transfer` unless texts were erased.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conceptzap.redteam import discrete
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import CONTINUOUS, EVADE, STRAIGHT, TRANSFER, Tensors, Victim
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier, split

PAPER = "2302.03668"
FORMS = (TRANSFER, STRAIGHT, EVADE, CONTINUOUS)
PAPER_SETTINGS = {"steps": 3000, "tokens": 16}


@dataclass(frozen=True)
class Config:
    tokens: int = config.tokens(8)
    steps: int = 80
    lr: float = 0.1
    decay: float = 0.1
    evade: float = 0.3


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    carrier = Carrier.alone(victim.base, len(victim.probes), cfg.tokens)
    for form in victim.forms(FORMS, texts=True):
        on = victim.on(form)
        for variant, usable in discrete.vocabularies(victim).items():
            if form == CONTINUOUS and variant != discrete.NAMED:
                continue  # embeddings are no words

            def make(at: slice, on: Victim = on, form: str = form, usable: Tensor = usable) -> Tensors:
                return _searched(on, cfg, form, carrier.by(on.base), usable, at, report)

            kept = on.in_parts(["pez", form, variant, *vars(cfg).values()], make, form)
            yield _read(form, variant, carrier, kept)


def _searched(
    victim: Victim, cfg: Config, form: str, carrier: Carrier, usable: Tensor, at: slice, report: Report
) -> Tensors:
    """The best tokens [n, k] for these probes, or embeddings an encoder, of all steps."""
    wanted = victim.reads.encode(victim.prompts[at])
    begun = discrete.begin(victim, len(carrier), cfg.tokens, usable)[at]
    v, carrier = nn.Parameter(discrete.joined(victim, begun)), carrier.rows(at)
    adam = torch.optim.AdamW([v], lr=cfg.lr, weight_decay=cfg.decay, foreach=False, fused=False)
    best, kept = torch.full((len(carrier),), torch.inf), v.detach().clone()
    for _ in report.count(range(cfg.steps), cfg.steps, f"searching, {form}"):
        free = v if form == CONTINUOUS else discrete.projected(victim, v, usable)
        cond = carrier.states(split(victim.base, free))
        cost = cfg.evade * victim.evasion(form, cond) - discrete.alike(cond, wanted)  # [n]
        better = cost.detach().cpu() < best
        best = torch.where(better, cost.detach().cpu(), best)
        kept = torch.where(better.to(v.device)[:, None, None], v.detach(), kept)
        adam.zero_grad(set_to_none=True)
        torch.autograd.backward(cost.sum(), inputs=[v])
        adam.step()
    if form == CONTINUOUS:
        return discrete.kept(split(victim.base, kept))
    return {"tokens": discrete.nearest(victim, kept, usable)}


def _read(form: str, variant: str, carrier: Carrier, kept: Tensors) -> Attempt:
    if "tokens" in kept:
        ids = kept["tokens"].cpu()
        return Attempt(form, variant, carrier.texts(ids), cond=carrier.written(ids), found={"tokens": ids})
    with torch.no_grad():
        free = [kept[name] for name in sorted(kept)]
        return Attempt(form, "", cond=carrier.states(free), found=kept)
