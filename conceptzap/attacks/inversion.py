"""Learned tokens: a word for the concept found by textual inversion, put in place of its name.

Pham et al. 2024 (CCE): on pictures of the concept x_0 and captions c(v) that have free tokens v for
its name, min_v E || noise - eps(x_t, t, c(v)) ||^2 (Gal et al. 2022), on the model that is attacked,
with 1 free token. Differs: also with 4, the pictures are the base's own, and all probes share what was
found; `taught` has the base's own estimate for the noise, which takes a tenth of the steps. The embeddings
need be no tokens, so every form is continuous; `transfer` never sees the erasure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.evaluation.probes import seed_of
from conceptzap.redteam import discrete, search
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.carrier import common, without
from conceptzap.redteam.victim import EVADE, STRAIGHT, TRANSFER, Tensors, Victim
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier, split

PAPER = "2308.01508"
FORMS = (TRANSFER, STRAIGHT, EVADE)
PAPER_SETTINGS = {"rounds": 5, "steps": 1000, "pictures": 25, "batch": 16, "lr": 0.005, "taught": False}


@dataclass(frozen=True)
class Config:
    fewest: int = config.tokens(1)  # free tokens, of the first search
    most: int = config.tokens(4)  # of the second; the same number makes only one
    rounds: int = 2  # tries, one after each round
    steps: int = 50  # of a round
    lr: float = 0.01
    decay: float = 0.0
    batch: int = 4
    taught: bool = True  # towards the base's estimate of the noise, not the noise itself
    pictures: int = 12  # of the concept, that are learned from
    evade: float = 0.3  # weight of the gates' margins


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    prompts = [victim.prompts[i % len(victim.prompts)] for i in range(cfg.pictures)]
    seeds = [seed_of(f"invert-{victim.seed}", prompt, i) for i, prompt in enumerate(prompts)]
    clean = victim.pictured(prompts, seeds, report)  # [pictures, c, h, w]
    aims = _aims(victim, cfg, prompts, clean, report) if cfg.taught else None
    for free in dict.fromkeys((cfg.fewest, cfg.most)):
        taught = Carrier.instead(victim.base, prompts, victim.words, free)
        asked = Carrier.instead(victim.base, victim.prompts, victim.words, free)
        for form in victim.forms(FORMS):
            yield from _searched(victim, cfg, form, taught, asked, clean, aims, report)


def _searched(
    victim: Victim, cfg: Config, form: str, taught: Carrier, asked: Carrier, clean: Tensor,
    aims: Tensor | None, report: Report,
) -> Iterator[Attempt]:  # fmt: skip
    ids = discrete.begin(victim, 1, taught.free, common(victim.base, victim.words), taught.free)
    on = victim.on(form)
    seen, start = taught.by(on.base), {"v": discrete.joined(on, ids)}  # [1, k, d]

    def loss(v: dict, generator: torch.Generator, step: int) -> Tensor:
        rows, t, x, noise = _drawn(on, cfg, clean, generator)
        free = split(on.base, v["v"].expand(len(rows), -1, -1))
        cond = seen.rows(rows).states(free)
        aim = noise if aims is None else aims[step].to(noise)
        error = (on.eps(form, x, t, cond) - aim).pow(2).flatten(1).mean(1)
        return (error + cfg.evade * on.evasion(form, cond)).mean()

    about = ["inversion", taught.free, cfg.batch, cfg.pictures, cfg.evade, cfg.taught]
    word = "token" if taught.free == 1 else "tokens"
    for found in search.search(on, form, about, start, loss, search.Pace.of(cfg), report):
        free = split(victim.base, found["v"].expand(len(asked), -1, -1))
        with torch.no_grad():
            cond = asked.states(free)
        kept = discrete.kept(split(victim.base, found["v"]))
        yield Attempt(form, f"{taught.free} {word}", _shown(victim), cond=cond, found=kept)


def _drawn(
    victim: Victim, cfg: Config, clean: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures [batch] of a step, their timesteps, the noised latents [batch, c, h, w] and the noise."""
    rows = torch.randint(len(clean), (cfg.batch,), generator=generator)
    t = search.times(victim, len(rows), generator).to(clean.device)
    return rows, t, *victim.noised(clean[rows], t, generator)


def _aims(victim: Victim, cfg: Config, prompts: list[str], clean: Tensor, report: Report) -> Tensor:
    """What who knows the concept sees in the latents of every step: [steps, batch, c, h, w].

    All searches draw the same latents at the same step, so it is asked for once, many steps a call.
    """
    known, total = victim.knows, cfg.rounds * cfg.steps
    wanted = known.encode(prompts)

    @torch.no_grad()
    def seen(steps: range) -> Tensor:
        parts = [_drawn(victim, cfg, clean, victim.generator(step)) for step in steps]
        rows, t, x, _ = (torch.cat(each) for each in zip(*parts, strict=True))
        return known.eps(x, t, wanted[rows]).unflatten(0, (len(steps), -1))

    def make() -> Tensors:
        size = max(1, victim.settings.batch // cfg.batch)
        chunks = [range(at, min(total, at + size)) for at in range(0, total, size)]
        parts = report.count(map(seen, chunks), len(chunks), "what the base sees")
        return {"eps": torch.cat(list(parts))}

    about = ["inversion-aims", cfg.batch, cfg.pictures, total]
    return victim.once(about, make, TRANSFER)["eps"]


def _shown(victim: Victim) -> list[str]:
    """The probes' prompts with `*` for the words that the free tokens stand in for."""
    return [f"{without(victim.base, prompt, victim.words)} *" for prompt in victim.prompts]
