"""Closed-form edits of the text states before cross-attention, and their low-rank form.

Every K/V edit whose targets are the projections of other text states is W M with one M for all
layers (UCE's eq. 7 with v* = W c*), so it is stored as one pair `into down` and W never appears.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.training.detector import states
from conceptzap.training.wordings import Pair


def _find(ids: list[int], word: list[int]) -> int:
    """Where `word` starts in `ids`, or -1."""
    spots = (i for i in range(len(ids) - len(word) + 1) if ids[i : i + len(word)] == word)
    return next(spots, -1) if word else -1


def align(
    asked: list[int], instead: list[int], concept: list[int], anchor: list[int], end: int
) -> list[int]:
    """For each position of the concept's prompt, the position of the anchor's whose state it becomes.

    -1 in front of the concept: in a causal encoder those states do not know of it yet. The concept's
    own tokens become the anchor's last one, words both prompts have become each other, whatever
    follows becomes the end of text, and the padding lines up.
    """
    first, end_asked, end_instead = _find(asked, concept), asked.index(end), instead.index(end)
    spot = _find(instead, anchor)
    target = spot + len(anchor) - 1 if spot >= 0 else end_instead
    last_seen = {token: i for i, token in enumerate(instead[:end_instead])}
    result = []
    for position, token in enumerate(asked):
        if position < first or position == 0:
            result.append(-1)
        elif position >= end_asked:
            result.append(max(position, end_instead))
        elif token in concept:
            result.append(target)
        else:
            result.append(last_seen.get(token, end_instead))
    return result


def aligned_states(
    base: Base, pairs: Sequence[Pair], concept: str, anchor: str
) -> tuple[Tensor, Tensor, Tensor]:
    """States to move [n, d], what they become [n, d], and the states in front of the concept [m, d]."""
    tokenizer = base.tokenizers[0]
    asked, instead = [p.concept for p in pairs], [p.anchor for p in pairs]
    ids_asked, ids_instead = base.token_ids(asked)[0].tolist(), base.token_ids(instead)[0].tolist()
    words = [
        tokenizer(w, add_special_tokens=False).input_ids if w else [] for w in (concept, anchor)
    ]
    c, a = states(base, asked), states(base, instead)
    end = tokenizer.eos_token_id
    maps = torch.tensor(
        [align(x, y, *words, end) for x, y in zip(ids_asked, ids_instead, strict=True)]
    )
    moved = maps >= 0
    rows = torch.arange(len(maps))[:, None].expand_as(maps)
    return c[moved], a[rows[moved], maps[moved]], c[~moved]


def solve(
    source: Tensor, target: Tensor, keep: Tensor, *, rank: int, ridge: float, keep_scale: float
) -> dict[str, Tensor]:
    """`into` [d, r] and `down` [r, d] of M - I, M = argmin |M c - c*|^2 + k |M p - p|^2 + ridge |M - I|^2.

    The sums over states are means times 1, so that ridge does not depend on how many there are. The
    cut to rank r is the best one for the states at hand, not for M itself.
    """
    c, wanted, p = source.double(), target.double(), keep.double()
    gram = c.T @ c / len(c) + ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    if len(p):
        gram = gram + keep_scale * (p.T @ p) / len(p)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(1e-12).rsqrt() @ vectors.T
    u, s, vh = torch.linalg.svd((wanted - c).T @ c / len(c) @ root, full_matrices=False)
    r = min(rank, len(s))
    return {
        "into": (u[:, :r] * s[:r]).float().contiguous(),
        "down": (vh[:r] @ root).float().contiguous(),
    }
