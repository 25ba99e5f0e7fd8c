"""Text states of prompts, each prompt encoded once: what gates and closed forms are fitted on.

Contract: `States.of(base, prompts, report)` runs the text encoders once over the distinct prompts and
keeps what comes out on the CPU in half precision, so that nothing of it stays on the device; rows are
asked for by prompt, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.report import Report

CHUNK = 32  # prompts a call of the text encoders


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
        chunks = [distinct[i : i + CHUNK] for i in range(0, len(distinct), CHUNK)]
        hidden, ids, pooled = [], [], []
        for chunk in (report or Report()).count(chunks, len(chunks), "reading prompts"):
            cond = base.encode(chunk)
            hidden.append(cond.states.to("cpu", torch.float16))  # [chunk, length, width]
            ids.append(base.token_ids(chunk)[0])
            if cond.pooled is not None:
                pooled.append(cond.pooled.to("cpu", torch.float32))
        tokens = torch.cat(ids)
        return States(
            index={prompt: number for number, prompt in enumerate(distinct)},
            hidden=torch.cat(hidden),
            ids=tokens,
            ends=(tokens == base.tokenizers[0].eos_token_id).int().argmax(1),
            pooled=torch.cat(pooled) if pooled else None,
            parts=tuple(encoder.config.hidden_size for encoder in base.text_encoders),
        )

    def rows(self, prompts: Sequence[str]) -> list[int]:
        return [self.index[prompt] for prompt in prompts]

    def chunks(self, prompts: Sequence[str]) -> Iterator[list[int]]:
        """The rows of the prompts, `CHUNK` at a time: nothing is held as fp32 but these."""
        rows = self.rows(prompts)
        for start in range(0, len(rows), CHUNK):
            yield rows[start : start + CHUNK]
