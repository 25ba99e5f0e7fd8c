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

from conceptzap.evaluation.probes import seed_of
from conceptzap.redteam import discrete, search
from conceptzap.redteam.attempt import Attempt
from conceptzap.training.carrier import Carrier, split
from conceptzap.redteam.victim import EVADE, STRAIGHT, TRANSFER, Victim
from conceptzap.report import Report

PAPER = "2308.01508"
FORMS = (TRANSFER, STRAIGHT, EVADE)
PAPER_SETTINGS = {"rounds": 5, "steps": 1000, "pictures": 25, "batch": 16, "lr": 0.005, "taught": False}


@dataclass(frozen=True)
class Config:
    fewest: int = 1  # free tokens, of the first search
    most: int = 4  # of the second; the same number makes only one
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
    for free in dict.fromkeys((cfg.fewest, cfg.most)):
        taught = Carrier.instead(victim.base, prompts, victim.words, free)
        asked = Carrier.instead(victim.base, victim.prompts, victim.words, free)
        for form in victim.forms(FORMS):
            yield from _searched(victim, cfg, form, taught, asked, (prompts, clean), report)


def _searched(
    victim: Victim, cfg: Config, form: str, taught: Carrier, asked: Carrier, shown: tuple, report: Report
) -> Iterator[Attempt]:
    prompts, clean = shown
    wanted = victim.knows.encode(prompts) if cfg.taught else None
    ids = discrete.begin(victim, 1, taught.free, _common(victim), taught.free)
    start = {"v": discrete.joined(victim, ids)}  # [1, k, d]

    def loss(v: dict, generator: torch.Generator, step: int) -> torch.Tensor:
        rows = torch.randint(len(clean), (cfg.batch,), generator=generator)
        free = split(victim.base, v["v"].expand(len(rows), -1, -1))
        cond = taught.rows(rows).states(free)
        t = search.times(victim, len(rows), generator)
        aim = None if wanted is None else wanted[rows]
        error = search.noise_error(victim, form, cond, clean[rows], generator, t, aim)
        return (error + cfg.evade * victim.evasion(form, cond)).mean()

    about = ["inversion", taught.free, cfg.batch, cfg.pictures, cfg.evade, cfg.taught]
    word = "token" if taught.free == 1 else "tokens"
    for found in search.search(victim, form, about, start, loss, search.Pace.of(cfg), report):
        free = split(victim.base, found["v"].expand(len(asked), -1, -1))
        with torch.no_grad():
            cond = asked.states(free)
        kept = discrete.kept(split(victim.base, found["v"]))
        yield Attempt(form, f"{taught.free} {word}", _shown(victim), cond=cond, found=kept)


def _common(victim: Victim) -> torch.Tensor:
    """Whole words to begin from, [vocabulary]: not those that are attacked."""
    tokenizer = victim.base.tokenizers[0]
    words = victim.base.vocabulary()
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    barred = {part for word in victim.words for part in word.casefold().split()}
    usable = torch.zeros(len(tokenizer), dtype=torch.bool)
    for word, found in zip(words, ids, strict=True):
        if len(found) == 1 and word not in barred:
            usable[found[0]] = True
    return usable


def _shown(victim: Victim) -> list[str]:
    """The probes' prompts with `*` for the words that the free tokens stand in for."""
    from conceptzap.redteam.carrier import without

    return [f"{without(victim.base, prompt, victim.words)} *" for prompt in victim.prompts]
