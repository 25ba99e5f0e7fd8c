"""Tokens as something that a gradient can move: nearest-token projection, relaxed one-hot rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from conceptzap.base import Cond
from conceptzap.redteam.carrier import allowed
from conceptzap.redteam.victim import Victim
from conceptzap.training.carrier import tables

NAMED, UNNAMED = "named", "unnamed"


def vocabularies(victim: Victim) -> dict[str, Tensor]:
    """The tokens [vocabulary] of a prompt that may not hold the concept's words, and of one that may."""
    return {UNNAMED: allowed(victim.base, victim.words), NAMED: allowed(victim.base, ())}


def begin(victim: Victim, n: int, free: int, usable: Tensor, stream: int = 0) -> Tensor:
    """Random usable tokens to begin with, [n, free]."""
    known = usable.nonzero()[:, 0]
    draw = torch.randint(len(known), (n, free), generator=victim.generator(-1, stream))
    return known[draw]


def embedded(victim: Victim, ids: Tensor) -> list[Tensor]:
    """Embeddings [n, k, d] of tokens [n, k], one tensor an encoder."""
    return [table[ids.to(table.device)] for table in tables(victim.base)]


def nearest(victim: Victim, joined: Tensor, usable: Tensor) -> Tensor:
    """The usable token nearest to each embedding, [n, k] from [n, k, d]."""
    table = torch.cat(tables(victim.base), -1)  # [vocabulary, d]
    far = torch.cdist(joined.detach().flatten(0, 1), table).masked_fill(~usable.to(table.device), torch.inf)
    return far.argmin(-1).view(joined.shape[:2])


def projected(victim: Victim, joined: Tensor, usable: Tensor) -> Tensor:
    """The nearest tokens' embeddings with the gradient of the free ones (straight-through)."""
    hard = torch.cat(embedded(victim, nearest(victim, joined, usable)), -1)
    return hard + (joined - joined.detach())


def simplex(rows: Tensor) -> Tensor:
    """The nearest points of the probability simplex to rows [..., v] (Duchi et al. 2008)."""
    ordered = rows.sort(-1, descending=True).values
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    excess = (ordered.cumsum(-1) - 1) / count  # [..., v]
    last = (ordered > excess).sum(-1, keepdim=True) - 1
    return (rows - excess.gather(-1, last)).clamp(min=0)


def sampled(victim: Victim, rows: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Embeddings of tokens drawn from relaxed one-hot rows [n, k, v], with the rows' gradient."""
    flat = rows.detach().flatten(0, 1).cpu().clamp(min=1e-12)
    ids = flat.multinomial(1, generator=generator).view(rows.shape[:2])
    hard = one_hot(ids, rows.shape[-1]).to(rows)
    soft = hard + (rows - rows.detach())  # [n, k, v]
    return [soft @ table for table in tables(victim.base)]


def alike(found: Cond, wanted: Cond) -> Tensor:
    """Cosine of what sums a text up with the same of another: [n].

    Where an encoder has pooled text, that; else the mean of all states, which are what is attended to. The
    last of the padding says little: on the built-in checkpoint a cat's is as near a church's as a chapel's.
    """
    if found.pooled is not None and wanted.pooled is not None:
        return cosine_similarity(found.pooled, wanted.pooled, dim=-1)
    return cosine_similarity(found.states.mean(1), wanted.states.mean(1), dim=-1)


def joined(victim: Victim, ids: Tensor) -> Tensor:
    """Embeddings [n, k, d1 + d2] of tokens, those of all encoders side by side."""
    return torch.cat(embedded(victim, ids), -1)


def kept(embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
    """Found embeddings under the names they are stored by."""
    return {f"embedding_{number}": one for number, one in enumerate(embeddings, 1)}
