"""What a ledger writes down: a call while it runs, and what every edit did in all of them, the proof."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from conceptzap.edit import Edit
from conceptzap.errors import SilentEditError
from conceptzap.runtime.gates import Strengths

STRIPPED = (
    "something replaced or bypassed the module: fused QKV projections, a rebuilt layer, or a graph"
    " compiled before attaching (torch.compiler.reset() drops it); undo it and attach again"
)
MEMO_LIMIT = 64


class Watched(Protocol):
    """Whoever counts rows at the module of a path; a module may have two."""

    path: str


@dataclass(frozen=True)
class Tally:
    """UNet rows an edit was open and shut for, by position in the batch, over all calls."""

    opened: Counter[int]
    shut: int

    @property
    def open(self) -> int:
        return self.opened.total()

    @property
    def fired(self) -> bool:
        return self.open > 0


@dataclass(repr=False)
class Receipt:
    """The proof of a picture: UNet calls seen, and for every edit open + shut = rows of those calls.

    `opened` [edits, positions in the batch] counts open rows, `shut` [edits] the others.
    """

    edits: tuple[Edit, ...]
    calls: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        self.opened = np.zeros((len(self.edits), 0), np.int64)
        self.shut = np.zeros(len(self.edits), np.int64)

    def __repr__(self) -> str:
        fired = int(self.opened.any(1).sum())
        return f"Receipt({self.calls} calls, {self.rows} rows, {fired} of {len(self.edits)} edits fired)"

    def add(self, levels: np.ndarray) -> None:
        """Count one call, by the largest strength of each edit in each row, [edits, rows]."""
        is_open, more = levels > 0, levels.shape[1] - self.opened.shape[1]
        if more > 0:
            self.opened = np.pad(self.opened, ((0, 0), (0, more)))
        self.opened[:, : levels.shape[1]] += is_open
        self.shut += (~is_open).sum(1)
        self.calls += 1
        self.rows += levels.shape[1]

    @property
    def tallies(self) -> list[Tally]:
        """One for each edit, as of now."""
        counts = zip(self.opened.tolist(), self.shut.tolist(), strict=True)
        return [Tally(Counter({i: n for i, n in enumerate(row) if n}), shut) for row, shut in counts]

    @property
    def by_name(self) -> dict[str, Tally]:
        return {edit.name: tally for edit, tally in zip(self.edits, self.tallies, strict=True)}

    def fired(self, positions: Sequence[int] | None = None) -> frozenset[str]:
        """Names of the edits that were open for any row, or any at these positions in the batch."""
        opened = self.opened
        if positions is not None:
            opened = opened[:, [p for p in positions if p < opened.shape[1]]]
        return frozenset(self.edits[index].name for index in np.flatnonzero(opened.any(1)))

    def verify(self, calls: int) -> None:
        """Raise unless every edit was accounted for at exactly `calls` UNet calls."""
        if self.edits and self.calls != calls:
            raise SilentEditError(
                f"{calls} UNet calls were made but the edits saw {self.calls}", STRIPPED
            )
        counted = self.opened.sum(1) + self.shut
        for index in np.flatnonzero(counted != self.rows):
            op = self.edits[index].op
            message = f"an edit {op!r} accounts for {counted[index]} of {self.rows} rows"
            raise SilentEditError(message, STRIPPED)


class Reading:
    """What the gates said of some text states, and what was made of these states meanwhile."""

    def __init__(self, strengths: Strengths) -> None:
        self.strengths = strengths
        self.levels = strengths.levels.detach().numpy()  # [edits, rows]
        self.acting = tuple(np.flatnonzero(self.levels.any(1)).tolist())
        # edits of strength 1 everywhere; asked here, where no graph is recorded that would break at it
        whole = np.flatnonzero((strengths.rows.detach() == 1).all(1).numpy()).tolist()
        self.whole = frozenset(whole) - strengths.places.keys()
        self.memo: dict[tuple, Any] = {}  # made of the strengths
        self.texts: dict[tuple, tuple[Tensor, Any]] = {}  # made of a text, which is kept beside it

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` makes of the strengths alone, made once."""
        if torch.compiler.is_compiling():  # a graph that reads what the last one kept is another graph
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass
class Call:
    """One UNet call: how strongly each edit acts on each row, and which rows each hook saw.

    `states` [rows, length, width] and `times` [rows], on the CPU, are what it was given; `times` is
    None where nothing depends on them. `unconditional`: how many of the rows, from the first; `leading`: the
    same, if guidance leads away from what they show, else 0.
    `steered`: guides that have been at work. `given`: the arguments, where it may be made anew.
    `resting`: no hook but the UNet's own sees it.
    """

    rows: int
    reading: Reading
    states: Tensor
    times: Tensor | None = None
    unconditional: int = 0
    leading: int = 0
    steered: set[int] = field(default_factory=set)
    given: tuple[tuple, dict[str, Any]] = ((), {})
    entered: dict[Watched, int] = field(default_factory=lambda: defaultdict(int))
    left: dict[Watched, int] = field(default_factory=lambda: defaultdict(int))
    running: bool = True
    resting: bool = False

    @property
    def idle(self) -> bool:
        return not self.reading.acting

    def leave(self, hook: Watched, rows: int) -> None:
        """Count rows that leave a module, which must have entered it before."""
        self.left[hook] += rows
        if self.left[hook] > self.entered[hook]:
            raise SilentEditError(f"{hook.path} was left without being entered", STRIPPED)

    def among(self, indices: frozenset[int]) -> tuple[int, ...]:
        """Those of the edits that act on any row, in order."""
        return tuple(filter(indices.__contains__, self.reading.acting)) if indices else ()

    def table(self, indices: tuple[int, ...]) -> Tensor | None:
        """Strengths [rows, m], or [rows, length, m] where a `token` gate is among them; None: all are 1."""
        return self.reading.once(("table", indices), lambda: self._table(indices))

    def _table(self, indices: tuple[int, ...]) -> Tensor | None:
        rows, places = self.reading.strengths.rows, self.reading.strengths.places
        if not any(index in places for index in indices):
            whole = not rows.requires_grad and self.reading.whole.issuperset(indices)
            return None if whole else rows[list(indices)].T  # [rows, m]
        shape = next(iter(places.values()))  # [rows, length]
        columns = [places.get(index, rows[index].to(shape)[:, None]).expand_as(shape) for index in indices]
        return torch.stack(columns, -1)

    def strength(
        self, indices: tuple[int, ...], like: Tensor, times: Sequence[int] | None = None
    ) -> Tensor | None:
        """`table` where `like` is, in its dtype, column i repeated `times`[i] times."""

        def make() -> Tensor | None:
            table = self.table(indices)
            if table is None:
                return None
            if times is not None:
                repeats = torch.tensor(times, device=table.device)
                table = table.repeat_interleave(repeats, -1, output_size=sum(times))
            return table.to(like.device, like.dtype)

        return self.reading.once(("strength", indices, times, like.device, like.dtype), make)

    def distinct(self, indices: tuple[int, ...]) -> list[tuple[list[float], Tensor | None]]:
        """Each set of strengths that some row (or place) has, with a mask of where; shut ones left out."""

        def make() -> list[tuple[list[float], Tensor | None]]:
            table = self.table(indices)
            if table is None:
                return [([1.0] * len(indices), None)]
            sets, which = torch.unique(table.flatten(0, -2), dim=0, return_inverse=True)
            which = which.view(table.shape[:-1])  # [rows] or [rows, length]
            everywhere = len(sets) == 1
            return [
                (numbers, None if everywhere else which == line)
                for line, numbers in enumerate(sets.tolist())
                if any(numbers)
            ]

        return self.reading.once(("distinct", indices), make)

    def once(self, key: tuple, text: Tensor, make: Callable[[Call, Tensor], Any]) -> Any:
        """What `make` makes of the text states, once a text: all cross-attentions read the same.

        The text is kept beside the value, so that its id in the key stays its own. Made anew while
        gradients are recorded, where checkpointing must replay every operation, and in a compiled graph.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make(self, text)
        memo, key = self.reading.texts, (*key, id(text))
        if key not in memo:
            if len(memo) >= MEMO_LIMIT:  # every module reads a copy of its own, as under offloading
                memo.clear()
            memo[key] = (text, make(self, text))
        return memo[key][1]
