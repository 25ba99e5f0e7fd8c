"""Closed-form edits of what the UNet reads of a text: the states and, in SDXL, the pooled text.

Every K/V edit whose targets are the projections of other text states is W M with one M for all
layers (UCE's eq. 7 with v* = W c*), so it is stored as one pair `into down` and W never appears.

Contract: `moves(states, ...)` sums up what shall move and what shall stay, `solving` turns sums into
`into` [d, r] and `down` [r, d], `unsolved` makes the edits of a base of them; `solving.together` runs many
of both, `solve` and `edits` run one. SDXL's two encoders are solved apart, so that a concept in only one of
its two prompts is moved there; so is the pooled text, at the first layer of the added embedding, whose input
begins with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conceptzap.base import CROSS_KV, Base
from conceptzap.edit import Edit, Gate
from conceptzap.training.solving import Solving, Unsolved, alone
from conceptzap.training.states import CHUNK, States
from conceptzap.training.wordings import Pair

POOLED_SITE = "unet.add_embedding.linear_1"  # reads [pooled | time embeddings]
POOLED_KEEP = 0.1  # weight of what stays there, of its weight in the states: one vector a prompt, not 77
ENERGY = 0.999  # of the change, by which the rank is cut

_BELOW = partial(torch.linalg.solve_triangular, upper=False)


def align(
    prompt: list[int], target: list[int], names: Sequence[list[int]], anchor: list[int], end: int
) -> list[int]:
    """For each position of the concept's prompt, the position of the anchor's whose state it becomes.

    -1 in front of the concept: in a causal encoder those states do not know of it yet. The tokens of
    a name of the concept (`names`: itself, its synonyms) become the anchor's last one, words both
    prompts have become each other, whatever follows becomes the end of text, and the padding lines up.
    """
    named = {i + k for name in names for i in _spots(prompt, name) for k in range(len(name))}
    first = min(named, default=_first_difference(prompt, target))
    end_prompt, end_target = prompt.index(end), target.index(end)
    spot = next(_spots(target, anchor), -1)
    become = spot + len(anchor) - 1 if spot >= 0 else end_target
    last_seen = {token: i for i, token in enumerate(target[:end_target])}
    result = []
    for position, token in enumerate(prompt):
        if position < first or position == 0:
            result.append(-1)
        elif position >= end_prompt:
            result.append(max(position, end_target))
        elif position in named:
            result.append(become)
        else:
            result.append(last_seen.get(token, end_target))
    return result


def _spots(ids: list[int], word: list[int]) -> Iterator[int]:
    """Where `word` starts in `ids`, every time."""
    return (i for i in range(len(ids) - len(word) + 1) if word and ids[i : i + len(word)] == word)


def _first_difference(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (x, y) in pairs if x != y), len(one))


# -- sums over states


@dataclass
class Moves:
    """Sums over states of width d, fp64 on the CPU: what shall move, and what shall stay.

    `gram` sum c c^T, `cross` sum (c* - c) c^T over the n states that move; `kept` sum p p^T over the
    m that stay. Sums of several concepts add up.
    """

    width: int
    gram: Tensor = field(init=False)
    cross: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        square = (self.width, self.width)
        self.gram, self.cross, self.kept = (torch.zeros(square, dtype=torch.double) for _ in range(3))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Add states [k, d] and what they become [k, d]."""
        c = source.double()
        self.gram += c.T @ c
        self.cross += (target.double() - c).T @ c
        self.n += len(c)

    def keep(self, states: Tensor) -> None:
        """Add states [k, d] that stay."""
        p = states.double()
        self.kept += p.T @ p
        self.m += len(p)

    @property
    def mean_square(self) -> float:
        """Of the numbers of the states that move."""
        return self.gram.diagonal().mean().item() / max(1, self.n)

    def add(self, other: Moves) -> None:
        for name in ("gram", "cross", "kept"):
            getattr(self, name).add_(getattr(other, name))
        self.n, self.m = self.n + other.n, self.m + other.m

    @staticmethod
    def of(source: Tensor, target: Tensor, keep: Tensor) -> Moves:
        """The sums over states [n, d], what they become [n, d] and those that stay [m, d]."""
        total = Moves(source.shape[1])
        total.move(source, target)
        total.keep(keep)
        return total


def moves(
    base: Base,
    states: States,
    pairs: Sequence[Pair],
    names: Sequence[str],
    anchor: str,
    keep: Sequence[str],
) -> list[Moves]:
    """The sums of each text encoder's part of the states and, last, of the pooled text where there is one.

    `names` are what the concept is called in the pairs. What stays: the prompts of `keep`, and what
    stands in front of the concept.
    """
    sums = [Moves(width) for width in states.parts]
    for three in aligned(base, states, pairs, names, anchor):
        halves = zip(sums, *(part.split(states.parts, -1) for part in three), strict=True)
        for total, source, target, front in halves:
            total.move(source, target)
            total.keep(front)
    for rows in states.chunks(keep):
        for total, part in zip(sums, states.hidden[rows].float().split(states.parts, -1), strict=True):
            total.keep(part.flatten(0, 1))
    return [*sums, *_pooled(states, pairs, keep)]


def aligned(
    base: Base, states: States, pairs: Sequence[Pair], names: Sequence[str], anchor: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """In chunks: states that move [k, d], what they become [k, d], those in front of it [j, d]."""
    rows = states.rows([pair.concept for pair in pairs])
    targets = states.rows([pair.anchor for pair in pairs])
    maps = _maps(base, states, pairs, names, anchor)  # [pairs, length]
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        c, a = (states.hidden[which[chunk]].float() for which in (rows, targets))
        where = maps[chunk]
        moved = where >= 0
        index = torch.arange(len(where))[:, None].expand_as(where)[moved]
        yield c[moved], a[index, where[moved]], c[~moved]


def _maps(
    base: Base, states: States, pairs: Sequence[Pair], names: Sequence[str], anchor: str
) -> Tensor:
    """`align` for every pair: [pairs, length]."""
    tokenizer = base.tokenizers[0]
    words = [_ids(tokenizer, name) for name in names]
    rows = [(states.index[pair.concept], states.index[pair.anchor]) for pair in pairs]
    aligned = [
        align(
            states.ids[one].tolist(), states.ids[other].tolist(), words,
            _ids(tokenizer, anchor), tokenizer.eos_token_id,
        )
        for one, other in rows
    ]  # fmt: skip
    return torch.tensor(aligned)


def _ids(tokenizer, word: str) -> list[int]:
    return tokenizer(word, add_special_tokens=False).input_ids if word else []


def _pooled(states: States, pairs: Sequence[Pair], keep: Sequence[str]) -> list[Moves]:
    if states.pooled is None:
        return []
    prompts = ([pair.concept for pair in pairs], [pair.anchor for pair in pairs], keep)
    return [Moves.of(*(states.pooled[states.rows(which)] for which in prompts))]


# -- the solution


def solve(sums: Moves, *, rank: int, ridge: float, keep_scale: float) -> dict[str, Tensor]:
    """What `solving` finds, alone."""
    return alone(solving(sums, rank=rank, ridge=ridge, keep_scale=keep_scale))


def solving(
    sums: Moves, *, rank: int, ridge: float, keep_scale: float
) -> Solving[dict[str, Tensor]]:
    """`into` [d, r] and `down` [r, d] of M - I, M = argmin |M c - c*|^2 + k |M p - p|^2 + ridge |M - I|^2.

    The sums are means times 1, so that ridge does not depend on how many states there are. The cut
    to the smallest rank that holds `ENERGY` of the change, at most `rank`, is the best one
    for the states at hand, not for M itself.
    """
    # 1. the metric of the states at hand, G = L L^T
    lower = yield torch.linalg.cholesky, _metric(sums, ridge, keep_scale)  # [d, d]
    # 2. M - I = cross G^-1; in that metric, A = (M - I) L
    cross = sums.cross.T / max(1, sums.n)
    a = (yield _BELOW, lower, cross).mT  # [d, d]
    # 3. its singular triples by the eigenvectors of A A^T, ascending: a fifth of a full decomposition's time
    # and, for the first of them, as right
    values, vectors = yield torch.linalg.eigh, a @ a.T
    return _cut(rank, lower, a, values, vectors)


def _metric(sums: Moves, ridge: float, keep_scale: float) -> Tensor:
    """G [d, d]."""
    gram = sums.gram / max(1, sums.n)
    gram = gram + ridge * torch.eye(sums.width, dtype=torch.double)
    if sums.m:
        gram = gram + keep_scale * sums.kept / sums.m
    gram.diagonal().add_(1e-12 * gram.diagonal().mean().clamp_min(1e-12))
    return gram


def _cut(rank: int, lower: Tensor, a: Tensor, values: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """The pair of as many directions as hold the energy, at most `rank`."""
    u = vectors[:, -rank:].flip(1)
    s = values[-rank:].flip(0).clamp_min(1e-300).sqrt()
    vh = u.T @ a / s[:, None]
    held = s.square().cumsum(0) / a.square().sum().clamp_min(1e-300)
    r = max(1, min(rank, len(s), int((held < ENERGY).sum()) + 1))
    down = torch.linalg.solve_triangular(lower.T, vh[:r].T, upper=True).T  # [r, d]
    return {
        "into": (u[:, :r] * s[:r]).float().contiguous(),
        "down": down.float().contiguous(),
    }


def edits(base: Base, sums: Sequence[Moves], **settings: Any) -> list[Edit]:
    """What `unsolved` finds, alone."""
    return alone(unsolved(base, sums, **settings))


def unsolved(
    base: Base,
    sums: Sequence[Moves],
    *,
    rank: int,
    ridge: float,
    keep_scale: float,
    gates: tuple[Gate, ...] = (),
) -> Unsolved:
    """The edit of all keys and values and, where text is pooled, the one of the pooled text.

    `ridge` is in units of the states' mean square, so that it means the same for every text encoder.
    """
    weights = [keep_scale] * len(base.text_encoders) + [POOLED_KEEP * keep_scale]
    pairs: list[dict[str, Tensor]] = []
    for one, weight in zip(sums, weights, strict=False):
        rest = {"ridge": ridge * one.mean_square, "keep_scale": weight}
        pairs.append((yield from solving(one, rank=rank, **rest)))
    return _made(base, pairs, gates)


def _made(base: Base, solved: Sequence[dict[str, Tensor]], gates: tuple[Gate, ...]) -> list[Edit]:
    """The edits of pairs, one for each text encoder and, last, one for the pooled text."""
    count = len(base.text_encoders)
    into = torch.block_diag(*(one["into"] for one in solved[:count]))  # [width, ranks]
    down = torch.block_diag(*(one["down"] for one in solved[:count]))  # [ranks, width]
    made = [Edit("weight", base.sites(CROSS_KV), {"into": into, "down": down}, gates=gates)]
    return [*made, *(at_pooled(base, one, gates) for one in solved[count:])]


def edit_of(sites: Sequence[str], pair: Solving[dict[str, Tensor]]) -> Unsolved:
    """The edit of layers by one pair for all of them."""
    return [Edit("weight", tuple(sites), (yield from pair))]


def pooled_edit_of(base: Base, pair: Solving[dict[str, Tensor]]) -> Unsolved:
    return [at_pooled(base, (yield from pair))]


def at_pooled(base: Base, pair: dict[str, Tensor], gates: tuple[Gate, ...] = ()) -> Edit:
    """The edit of the pooled text by `into` [p, r] (or `up` [out, r]) and `down` [r, p], p its own width.

    The inputs behind the pooled text, the time embeddings, are neither read nor moved.
    """
    rest = base.module(POOLED_SITE).weight.shape[1] - pair["down"].shape[1]
    padded = {slot: tensor.float().contiguous() for slot, tensor in pair.items()}
    padded["down"] = torch.nn.functional.pad(padded["down"], (0, rest))
    if "into" in padded:
        padded["into"] = torch.nn.functional.pad(padded["into"], (0, 0, 0, rest))
    return Edit("weight", (POOLED_SITE,), padded, gates=gates)


def pooled_weight(base: Base, width: int) -> Tensor:
    """The columns [out, p] of the layer that read the pooled text, double, on the CPU."""
    return base.module(POOLED_SITE).weight.detach().cpu().double()[:, :width]
