"""What Ring-A-Bell aims at: a prompt without the concept's name, moved along the concept's direction."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from conceptzap.base import Cond
from conceptzap.evaluation.probes import STYLE, fill
from conceptzap.redteam.carrier import without
from conceptzap.redteam.victim import Victim

PAIRS = 24  # prompts with the concept, each with one that differs in the concept alone


def pairs(victim: Victim) -> list[tuple[str, str]]:
    """Prompts with the concept and the same without it, over the world's templates and subjects."""
    world, target = victim.world, victim.target
    objects = [s for s in world.subjects if s.kind != STYLE and s != target]
    if target.kind == STYLE:
        return [
            (fill(text, thing.words[0]), fill(world.templates[world.plain][0][0], thing.words[0]))
            for thing, text in zip(objects, itertools.cycle(world.templates[target.name][0]), strict=False)
        ][:PAIRS]
    texts = world.templates[world.plain][0]
    return [
        (fill(text, target.words[0]), fill(text, other.words[0]))
        for other, text in zip(objects, itertools.cycle(texts), strict=False)
    ][:PAIRS]


def direction(victim: Victim) -> Cond:
    """c over the world's pairs of prompts."""
    return along(*(victim.reads.encode(list(side)) for side in zip(*pairs(victim), strict=True)))


def along(with_it: Cond, without_it: Cond) -> Cond:
    """c = mean_i E(p_i with it) - E(p_i without it), one row [1, 77, d]; pooled text likewise."""
    pooled = None if with_it.pooled is None else (with_it.pooled - without_it.pooled).mean(0, keepdim=True)
    sizes = None if with_it.time_ids is None else with_it.time_ids[:1]
    return Cond((with_it.states - without_it.states).mean(0, keepdim=True), pooled, sizes)


def unnamed(victim: Victim) -> list[str]:
    """The probes' prompts without any word for the concept."""
    return [without(victim.base, prompt, victim.words) for prompt in victim.prompts]


def target(victim: Victim, strength: float) -> Cond:
    """T = E(prompt without the name) + eta c, one row a probe."""
    return moved(victim.base.encode(unnamed(victim)), direction(victim), strength)


def moved(plain: Cond, by: Cond, strength: float | Tensor) -> Cond:
    """E(p) + eta c, row by row; `by` is one row, eta one number or one a row, [n, 1]."""
    pooled: Tensor | None = None
    if plain.pooled is not None and by.pooled is not None:
        pooled = plain.pooled + strength * by.pooled
    wide = strength[..., None] if isinstance(strength, Tensor) else strength
    return Cond(plain.states + wide * by.states, pooled, plain.time_ids)


def far(found: Tensor, wanted: Tensor) -> Tensor:
    """Summed squared error of text states [n, length, d] over their common length: [n]."""
    length = min(found.shape[1], wanted.shape[1])
    return (found[:, :length] - wanted[:, :length]).pow(2).flatten(1).sum(1)


@torch.no_grad()
def states(victim: Victim, ids: Tensor) -> Tensor:
    """Text states [n, k + 2, d] of k tokens [n, k] between start and end, no padding behind them."""
    tokenizer = victim.base.tokenizers[0]
    ends = [torch.full((len(ids), 1), one) for one in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    whole = torch.cat([ends[0], ids.cpu(), ends[1]], 1)
    return victim.base.encode_ids([whole] * len(victim.base.text_encoders)).states
