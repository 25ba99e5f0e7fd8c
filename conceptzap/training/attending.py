"""Where a batch attends to the concept's own words, with gradients: for losses on attention and regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.report import Report
from conceptzap.runtime import attention
from conceptzap.runtime.attention import Taken
from conceptzap.training.lessons import Lesson
from conceptzap.training.objectives import Batch, Trajectories

SIDE = 16  # regions are found at this many pixels a side


@dataclass(frozen=True, kw_only=True)
class Marked(Batch):
    """`marks` [rows, length], true at the tokens of the concept or of a synonym."""

    marks: Tensor


@dataclass(frozen=True)
class MarkedLatents:
    """The concepts' trajectories, each with the marks [n, length] of its prompt."""

    drawn: Trajectories
    marks: Tensor

    @staticmethod
    def of(
        base: Base, taught: Sequence[Lesson], n: int, report: Report, end: bool = False
    ) -> MarkedLatents:
        """n of each; with `end` the end of text and what is behind it are marked, too."""
        words = [name for lesson in taught for name in (lesson.concept, *lesson.synonyms)]
        drawn = Trajectories.of_each(base, [lesson.pairs for lesson in taught], n, report)
        return MarkedLatents(drawn, marks(base, drawn.prompts, words, end))

    def between(self, low: int, high: int) -> MarkedLatents:
        """Only the latents of low <= t < high, or those nearest to that where there are none."""
        times = self.drawn.times
        off = (low - times).clamp(min=0) + (times - high + 1).clamp(min=0)
        chosen = off == off.min()
        drawn = replace(self.drawn, latents=self.drawn.latents[chosen], times=times[chosen])
        return MarkedLatents(drawn, self.marks)

    def draw(self, generator: torch.Generator, batch: int, part: int, parts: int) -> Marked:
        steps, n = self.drawn.latents.shape[:2]
        when = torch.randint(steps, (batch,), generator=generator)
        which = torch.randint(n, (batch,), generator=generator)
        rows = slice(batch * part // parts, batch * (part + 1) // parts)
        when, which = when[rows], which[rows]
        index = which.tolist()
        x = self.drawn.latents[when, which].to(self.drawn.device)  # [rows, c, h, w]
        concept, anchor = (cond[index] for cond in (self.drawn.concept, self.drawn.anchor))
        share = len(index) / batch
        return Marked(x, self.drawn.times[when], concept, anchor, share, marks=self.marks[which])


def marks(base: Base, prompts: Sequence[str], words: Sequence[str], end: bool = False) -> Tensor:
    """[n, length], true at the tokens of the words; with `end` also at the end of text and behind it."""
    ids = base.token_ids(prompts)[0]
    is_end = ids == base.tokenizers[0].eos_token_id
    result = is_end.cumsum(1) > 0 if end else torch.zeros_like(is_end)
    for row, prompt in enumerate(prompts):
        result[row, attention.positions(base, prompt, words)] = True
    return result


def shares(taken: Sequence[Taken], marked: Tensor) -> list[Tensor]:
    """Of every captured call, the attention [rows, heads, pixels] that goes to the marked tokens."""
    length = marked.shape[1]
    return [
        torch.stack(
            [
                attention.heads(call, row)[:, :, :length][:, :, columns.to(call.query.device)].sum(-1)
                for row, columns in enumerate(marked)
            ]
        )
        for call in taken
    ]


@torch.no_grad()
def region(base: Base, batch: Marked, cond: Cond, threshold: float) -> Tensor:
    """Where the base draws the concept: [rows, 1, SIDE, SIDE], 1 inside and 0 outside.

    Mean attention over heads and layers, divided by its largest value in each row, over `threshold`.
    """
    with attention.captured(base) as taken:
        base.eps(batch.x, batch.t, cond)
    layers = [_square(share.mean(1)) for share in shares(taken, batch.marks)]
    mean = torch.stack(layers).mean(0)  # [rows, 1, SIDE, SIDE]
    return (mean > threshold * mean.amax((1, 2, 3), keepdim=True)).float()


def _square(share: Tensor) -> Tensor:
    side = int(share.shape[1] ** 0.5)
    grid = share[:, : side * side].view(len(share), 1, side, side)
    return F.interpolate(grid, (SIDE, SIDE), mode="bilinear", align_corners=False)


def at_pixels(regions: Tensor, pixels: int) -> Tensor:
    """Regions [rows, 1, SIDE, SIDE] for a layer of that many pixels: [rows, pixels]."""
    side = int(pixels**0.5)
    return F.interpolate(regions, (side, side), mode="nearest").flatten(1)
