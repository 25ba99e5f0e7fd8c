"""Where the words of a prompt act in the picture: cross-attention, recomputed from what goes into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conceptzap.base import CROSS, Base
from conceptzap.edit import Edit
from conceptzap.result import Settings
from conceptzap.runtime.attach import attached
from conceptzap.runtime.sampler import denoise

LOOKS = 3  # timesteps that are averaged
SIDE = 16  # maps are brought to this many pixels a side


@dataclass(frozen=True)
class Maps:
    """Attention of one picture, mean over heads, layers and timesteps: part -> [side, side].

    Parts: `concept` (the tokens of its words), `learned` (rows that `tokens` edits add). `shares`:
    part -> share of all attention.
    """

    maps: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def look(
    base: Base,
    prompts: Sequence[str],
    words: Sequence[Sequence[str]],
    seeds: Sequence[int],
    settings: Settings,
    edits: Sequence[Edit],
) -> list[Maps]:
    """Attention while pictures are drawn together under the edits, one map for each.

    `words` of each prompt; those that it lacks are left out, as are learned rows behind a shut gate.
    """
    with attached(base, edits):
        cond, uncond = base.encode(prompts), base.unconditional(settings.negative)
        trail = list(denoise(base, cond, uncond, settings, base.noise(seeds)))[:-1]
        chosen = trail[:: max(1, len(trail) // LOOKS)][:LOOKS]
        taken: list[Taken] = []
        for t, latents in chosen:
            with captured(base) as calls:
                base.eps(latents, t, cond)
            taken += calls[: len(base.sites(CROSS))]  # guides call the UNet again, for their own texts
    length, named = cond.states.shape[1], map(positions, [base] * len(prompts), prompts, words)
    return [_maps(taken, row, columns, length) for row, columns in enumerate(named)]


def _maps(taken: Sequence[Taken], row: int, columns: Sequence[int], length: int) -> Maps:
    """The maps of one row of some calls: of the columns of its words, and of those behind its text."""
    total: dict[str, list[Tensor]] = {}
    for weights in (heads(call, row).mean(0) for call in taken):  # [pixels, tokens]
        found = {"concept": columns, "learned": range(length, weights.shape[1])}
        for part, rows in found.items():
            if rows and (seen := weights[:, list(rows)].sum(1)).any():
                total.setdefault(part, []).append(_square(seen))
    maps = {part: torch.stack(layers).mean(0) for part, layers in total.items()}
    return Maps(maps, {part: float(each.mean()) for part, each in maps.items()})


def positions(base: Base, prompt: str, words: Sequence[str]) -> list[int]:
    """Positions of the words' tokens in the encoded prompt, the start token counted."""
    tokenizer = base.tokenizers[0]
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    found: set[int] = set()
    for word in words:
        part = tokenizer(word, add_special_tokens=False).input_ids
        for start in range(len(ids) - len(part) + 1):
            if part and ids[start : start + len(part)] == part:
                found |= set(range(start, start + len(part)))
    return sorted(found)


@dataclass
class Taken:
    """What one cross-attention call attends with; `bias` [rows, 1, tokens] is its mask, if it has one."""

    heads: int
    scale: float
    bias: Tensor | None
    query: Tensor | None = None
    key: Tensor | None = None


@contextmanager
def captured(base: Base) -> Iterator[list[Taken]]:
    """Masks, queries and keys of every cross-attention call in the block, with the edits' changes."""
    taken: list[Taken] = []
    handles = []

    def watch(module: Any) -> None:
        def enter(_: object, args: tuple, kwargs: dict) -> None:
            bias = args[2] if len(args) > 2 else kwargs.get("attention_mask")
            taken.append(Taken(module.heads, module.scale, bias))

        def query(_: object, __: object, output: Tensor) -> None:
            taken[-1].query = output

        def key(_: object, __: object, output: Tensor) -> None:
            taken[-1].key = output

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.to_q.register_forward_hook(query))
        handles.append(module.to_k.register_forward_hook(key))

    for site in base.sites(CROSS):
        watch(base.module(site))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def heads(taken: Taken, row: int = 0) -> Tensor:
    """softmax(q k^T + bias) of one row of a call: [heads, pixels, tokens]."""
    query, key = (
        part[row].float().unflatten(-1, (taken.heads, -1)).transpose(0, 1)
        for part in (taken.query, taken.key)
    )
    logits = query @ key.transpose(-1, -2) * taken.scale
    return (logits if taken.bias is None else logits + taken.bias[row].float()).softmax(-1)


def _square(column: Tensor) -> Tensor:
    side = int(len(column) ** 0.5)
    grid = column[: side * side].view(1, 1, side, side)
    size = (SIDE, SIDE)
    return torch.nn.functional.interpolate(grid, size, mode="bilinear", align_corners=False)[0, 0].cpu()
