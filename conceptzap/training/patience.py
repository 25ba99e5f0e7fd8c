"""When a training has learned what it can: how much of the concept is gone, asked along the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.runtime.attach import attached
from conceptzap.training import memory
from conceptzap.training.wordings import Pair

CHECKS = 20  # in a whole training
LEAST, MORE = 0.5, 0.01  # what must be gone before it may end; what a check must bring to go on for
TIMES, PROMPTS = (900, 700, 500), 4  # of a check: timesteps, and prompts of each concept
SEED = 20250214  # of the noise that is looked at


class Patience:
    """Ends a training once `patience` checks in a row moved less than a hundredth of the way.

    `measure` gives what is gone now, of 1. `found` holds what it gave, and is kept with checkpoints.
    """

    def __init__(self, patience: int, measure: Callable[[], float]) -> None:
        self.patience, self.measure = patience, measure
        self.found: list[float] = []

    def look(self, step: int, total: int) -> None:
        """After a step: asks where a check is due."""
        if step % max(1, total // CHECKS) == 0:
            self.found.append(self.measure())

    @property
    def over(self) -> bool:
        """Whether it may end here."""
        if len(self.found) <= self.patience or self.found[-1] < LEAST:
            return False
        before, *last = self.found[-self.patience - 1 :]
        return all(abs(one - before) < MORE for one in last)


class Way:
    """The way of some prompts from what the base makes of them to what it makes of their anchors.

    One row a prompt and timestep: noise at that time, since the first steps decide what is drawn.
    """

    @torch.no_grad()
    def __init__(self, base: Base, pairs: Sequence[Pair]) -> None:
        self.base, self.times = base, torch.tensor([t for _ in pairs for t in TIMES])  # [rows]
        self.latents = base.noise([SEED + row for row in range(len(self.times))])  # [rows, c, h, w]
        self.prompts = [pair.concept for pair in pairs for _ in TIMES]
        self.start = self._estimate(self.prompts)
        self.way = self._estimate([pair.anchor for pair in pairs for _ in TIMES]) - self.start

    def _estimate(self, prompts: Sequence[str]) -> Tensor:
        def part(chunk: slice) -> Tensor:
            cond = self.base.encode(prompts[chunk])
            return self.base.eps(self.latents[chunk], self.times[chunk], cond).float()

        rows = memory.rows_that_fit(self.base, len(prompts))
        return torch.cat(list(memory.in_chunks(len(prompts), rows, part)))

    @torch.no_grad()
    def gone(self, edits: Sequence[Edit]) -> float:
        """The part of it that edits go, the mean over the rows on which they act; 0 is none, 1 all."""
        with attached(self.base, edits):
            moved = self._estimate(self.prompts) - self.start
        moved, way = moved.flatten(1), self.way.flatten(1)  # [rows, c h w]
        part = (moved * way).sum(1) / way.pow(2).sum(1).clamp(min=1e-12)  # [rows]
        acted = moved.any(1)
        return float(part[acted].mean()) if acted.any() else 0.0
