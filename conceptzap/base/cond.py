"""What a UNet is conditioned on, as rows that can be chosen, joined and moved together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """What the UNet is conditioned on, one row a prompt.

    `states` [n, length, width]; SDXL alone has `pooled` [n, width] and `time_ids` [n, 6].
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def _map(self, change: Any) -> Cond:
        fields = (self.states, self.pooled, self.time_ids)
        return Cond(*(None if field is None else change(field) for field in fields))

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Cond:
        """The chosen rows; a single index keeps the row dimension."""
        index = [rows] if isinstance(rows, int) else rows
        return self._map(lambda field: field[index])

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        return self._map(lambda field: field.to(*args, **kwargs))

    def repeat(self, times: int) -> Cond:
        """All rows `times` times over, in the order a, b, a, b."""
        return self._map(lambda field: torch.cat([field] * times))

    def zeroed(self) -> Cond:
        """Rows that say nothing: zeros for states and pooled text, the size ids as they are."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Cond(torch.zeros_like(self.states), pooled, self.time_ids)

    def towards(self, other: Cond, parts: Tensor) -> Cond:
        """Each row a part [n] of the way to the other's; what is no text stays."""
        parts = parts.to(self.states)
        pooled = self.pooled
        if pooled is not None:
            pooled = pooled.lerp(other.pooled, parts[:, None].to(pooled))
        return Cond(self.states.lerp(other.states, parts[:, None, None]), pooled, self.time_ids)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """The rows of all, in order."""
        columns = zip(*((c.states, c.pooled, c.time_ids) for c in conds), strict=True)
        return Cond(*(None if column[0] is None else torch.cat(column) for column in columns))
