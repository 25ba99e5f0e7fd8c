"""Text states of prompts, each prompt encoded once: what gates and closed forms are fitted on.

Contract: `States.of(base, prompts, report)` runs the text encoders once over the distinct prompts and
keeps what comes out on the CPU in half precision, so that nothing of it stays on the device; rows are
asked for by prompt, in fp32. Inside `shared()` a prompt is encoded once for all concepts, where that changes
no bit: on the CPU hidden states are the same in whatever company they are read, SDXL's pooled text is not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.report import Report
from conceptzap.runtime.attach import installed_on
from conceptzap.runtime.texts import of_text

CHUNK = 32  # prompts a call of the text encoders
MOST_KEPT = 2**29  # bytes of states that are shared

T = TypeVar("T", bound=tuple[Tensor, ...])

# a prompt's hidden [length, width] fp16, ids [length] and pooled [p]
Row = tuple[Tensor, Tensor, Tensor | None]


class _Shelf:
    """Rows of the prompts of one base, as many as may be kept."""

    def __init__(self) -> None:
        self.base: Base | None = None
        self.rows: dict[str, Row] = {}
        self.made: dict[Hashable, tuple[Tensor, ...]] = {}
        self.bytes = 0

    def of(self, base: Base) -> dict[str, Row]:
        if self.base is not base:
            self.base, self.rows, self.made, self.bytes = base, {}, {}, 0
        return self.rows

    def keep(self, prompt: str, row: Row) -> None:
        self.bytes += row[0].nbytes
        if self.bytes <= MOST_KEPT:
            self.rows[prompt] = row

    def make(self, base: Base, key: Hashable, work: Callable[[], T]) -> T:
        self.of(base)
        if key in self.made:
            return cast(T, self.made[key])
        made = work()
        self.bytes += sum(tensor.nbytes for tensor in made)
        if self.bytes <= MOST_KEPT:
            self.made[key] = made
        return made


_SHELF: ContextVar[_Shelf | None] = ContextVar("shelf", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Inside the block a prompt that was read once is not read again, where that changes no bit."""
    token = _SHELF.set(_Shelf())
    try:
        yield
    finally:
        _SHELF.reset(token)


def once(base: Base, key: Hashable, work: Callable[[], T]) -> T:
    """What `work` makes of a bare base and `key` alone, inside `shared()` made once; nobody may change it."""
    shelf = None if installed_on(base) else _SHELF.get()
    return shelf.make(base, key, work) if shelf else work()


@dataclass(frozen=True)
class States:
    """States of n distinct prompts.

    `hidden` [n, length, width] fp16 on the CPU, `ids` [n, length] of the first tokenizer, `ends` [n]
    the position of each end of text, `pooled` [n, p] (SDXL alone), `parts` the widths of the text
    encoders, which add up to `width`.
    """

    index: dict[str, int]
    hidden: Tensor
    ids: Tensor
    ends: Tensor
    pooled: Tensor | None
    parts: tuple[int, ...]

    @staticmethod
    @torch.no_grad()
    def of(base: Base, prompts: Sequence[str], report: Report | None = None) -> States:
        """The states of the distinct ones among `prompts`."""
        distinct = list(dict.fromkeys(prompts))
        hidden, ids, pooled = zip(*_rows(base, distinct, report or Report()), strict=True)
        tokens = torch.stack(ids)
        return States(
            index={prompt: number for number, prompt in enumerate(distinct)},
            hidden=torch.stack(hidden),
            ids=tokens,
            ends=(tokens == base.tokenizers[0].eos_token_id).int().argmax(1),
            pooled=None if pooled[0] is None else torch.stack(pooled),
            parts=tuple(encoder.config.hidden_size for encoder in base.text_encoders),
        )

    def joined(self, names: Sequence[str], cond: Cond, ids: Tensor, end: int) -> States:
        """These and states [n, length, width] that no prompt has, under names of their own.

        `ids` [n, length] of the first tokenizer, in which `end` ends a text.
        """
        index = self.index | {name: len(self.index) + i for i, name in enumerate(names)}
        hidden = torch.cat([self.hidden, cond.states.detach().to("cpu", torch.float16)])
        ends = torch.cat([self.ends, (ids == end).int().argmax(1)])
        pooled = self.pooled
        if pooled is not None and cond.pooled is not None:
            pooled = torch.cat([pooled, cond.pooled.detach().to("cpu", torch.float32)])
        return States(index, hidden, torch.cat([self.ids, ids]), ends, pooled, self.parts)

    def rows(self, prompts: Sequence[str]) -> list[int]:
        return [self.index[prompt] for prompt in prompts]

    def chunks(self, prompts: Sequence[str]) -> Iterator[list[int]]:
        """The rows of the prompts, `CHUNK` at a time: nothing is held as fp32 but these."""
        rows = self.rows(prompts)
        for start in range(0, len(rows), CHUNK):
            yield rows[start : start + CHUNK]


def _rows(base: Base, prompts: Sequence[str], report: Report) -> list[Row]:
    """The rows of distinct prompts; those that nobody has read yet are read in chunks."""
    alike = base.device.type == "cpu" and len(base.text_encoders) == 1
    alike = alike and not any(map(of_text, installed_on(base)))  # who reads otherwise than the base
    shelf = _SHELF.get() if alike else None
    found = dict(shelf.of(base)) if shelf else {}
    fresh = [prompt for prompt in prompts if prompt not in found]
    chunks = [fresh[i : i + CHUNK] for i in range(0, len(fresh), CHUNK)]
    for chunk in report.count(chunks, len(chunks), "reading prompts"):
        cond = base.encode(chunk)
        hidden = cond.states.to("cpu", torch.float16)  # [chunk, length, width]
        pooled = [None] * len(chunk) if cond.pooled is None else cond.pooled.to("cpu", torch.float32)
        for prompt, *row in zip(chunk, hidden, base.token_ids(chunk)[0], pooled, strict=True):
            found[prompt] = tuple(row)
            if shelf:
                shelf.keep(prompt, found[prompt])
    return [found[prompt] for prompt in prompts]
