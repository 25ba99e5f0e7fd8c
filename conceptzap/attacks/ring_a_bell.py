"""Tokens whose text states lie where the concept's direction points, found without any diffusion model.

Tsai et al. 2024 (Ring-A-Bell): c = mean_i E(p_i with the concept) - E(p_i without it), and tokens that
minimise || E(tokens) - (E(p) + eta c) ||^2 by a genetic search: a population of k tokens each, half of
it bred by crossover, some tokens mutated, the best kept. Differs: p is the probe without the concept's
name, and half of the first population begins with it; searched once with the concept's words barred and
once without; the states are compared where the tokens stand, not over the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.redteam import bell, discrete
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import STRAIGHT, TRANSFER, Victim
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier

PAPER = "2310.10012"
FORMS = (TRANSFER, STRAIGHT)  # without a diffusion model these are one, unless texts were erased
PAPER_SETTINGS = {"population": 200, "generations": 3000, "tokens": 16}


@dataclass(frozen=True)
class Config:
    eta: float = 3.0  # of the concept's direction; 3 for nudity, 5 to 5.5 for violence in the paper
    tokens: int = config.tokens(16)  # K; also 38 or all that there is room for
    population: int = 64  # of the genetic search
    generations: int = 80  # of it; 3000 in the paper
    mutation: float = config.share(0.25)  # chance that a child has one token replaced
    crossover: float = config.share(0.5)  # share of the population that is bred anew


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    for form in victim.forms(FORMS, texts=True):
        on = victim.on(form)
        for variant, usable in discrete.vocabularies(victim).items():

            def make(at: slice, on: Victim = on, usable: Tensor = usable) -> dict[str, Tensor]:
                return {"tokens": _evolved(on, cfg, usable, at, report)}

            kept = on.in_parts(["ring-a-bell", variant, *vars(cfg).values()], make, form)
            ids = kept["tokens"].cpu()  # [n, k]
            carrier = Carrier.alone(victim.base, len(ids), cfg.tokens)
            shown = carrier.texts(ids)
            yield Attempt(form, variant, shown, cond=carrier.written(ids), found={"tokens": ids})


def _evolved(victim: Victim, cfg: Config, usable: Tensor, at: slice, report: Report) -> Tensor:
    """The best tokens for each of these probes, [n, k]."""
    wanted = bell.target(victim, cfg.eta).states  # [n, 77, d]
    known, prompts = usable.nonzero()[:, 0], bell.unnamed(victim)
    rows = report.count(range(at.start, at.stop), at.stop - at.start, "breeding prompts")
    return torch.stack([_best(victim, cfg, wanted[i : i + 1], known, prompts[i], i) for i in rows])


def _best(victim: Victim, cfg: Config, wanted: Tensor, usable: Tensor, prompt: str, row: int) -> Tensor:
    """The tokens [k] that come nearest to the states [1, 77, d]."""
    generator = victim.generator(-3, row)

    def drawn(*shape: int) -> Tensor:
        return usable[torch.randint(len(usable), shape, generator=generator)]

    tokens = drawn(cfg.population, cfg.tokens)  # [population, k]
    begun = torch.tensor(victim.base.tokenizers[0](prompt, add_special_tokens=False).input_ids)[: cfg.tokens]
    tokens[::2, : len(begun)] = begun
    cost = bell.far(bell.states(victim, tokens), wanted)
    children = max(2, int(cfg.population * cfg.crossover))
    for _ in range(cfg.generations):
        # 1. the best are parents, pairs of them are cut at one place and joined
        tokens = tokens[cost.argsort()]
        cost = cost.sort().values
        parents = torch.randint(max(2, cfg.population - children), (2, children), generator=generator)
        cut = torch.randint(1, max(2, cfg.tokens), (children, 1), generator=generator)
        left = torch.arange(cfg.tokens)[None] < cut  # [children, k]
        bred = torch.where(left, tokens[parents[0]], tokens[parents[1]])
        # 2. some children have one token replaced
        place = torch.randint(cfg.tokens, (children, 1), generator=generator)
        mutated = torch.rand(children, 1, generator=generator) < cfg.mutation
        bred = torch.where(mutated, bred.scatter(1, place, drawn(children, 1)), bred)
        # 3. they take the places of the worst
        tokens[-children:] = bred
        cost[-children:] = bell.far(bell.states(victim, bred), wanted)
    return tokens[cost.argmin()]
