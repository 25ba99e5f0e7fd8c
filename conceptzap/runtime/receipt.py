"""The books of an attachment: what every edit did at every UNet call, and the proof that it ran.

Every hooked module must see every row of a call come in exactly once, and go out where an edit
writes there. So an edit that something stripped, doubled or went around is found at the end of the
call it was missing in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conceptzap.edit import Edit
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime.gates import TIMED, Signal, factor

STRIPPED = (
    "something replaced or bypassed the module: fused QKV projections, a rebuilt layer, or a graph"
    " compiled before attaching (torch.compiler.reset() drops it); undo it and attach again"
)
MEMO_LIMIT = 64


@dataclass
class Tally:
    """UNet rows an edit was open and shut for, by position in the batch, over all calls."""

    opened: Counter[int] = field(default_factory=Counter)
    shut: int = 0

    @property
    def open(self) -> int:
        return self.opened.total()

    @property
    def fired(self) -> bool:
        return self.open > 0


@dataclass
class Receipt:
    """The proof of a picture: UNet calls seen, and for every edit open + shut = rows of those calls."""

    edits: tuple[Edit, ...]
    calls: int = 0
    rows: int = 0
    tallies: list[Tally] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tallies = self.tallies or [Tally() for _ in self.edits]

    @cached_property
    def by_name(self) -> dict[str, Tally]:
        return {edit.name: tally for edit, tally in zip(self.edits, self.tallies, strict=True)}

    def verify(self, calls: int) -> None:
        """Raise unless every edit was accounted for at exactly `calls` UNet calls."""
        if self.edits and self.calls != calls:
            raise SilentEditError(
                f"{calls} UNet calls were made but the edits saw {self.calls}", STRIPPED
            )
        for edit, tally in zip(self.edits, self.tallies, strict=True):
            if tally.open + tally.shut != self.rows:
                raise SilentEditError(
                    f"a {edit.op!r} edit accounts for {tally.open + tally.shut} of {self.rows} rows",
                    STRIPPED,
                )


class Reading(NamedTuple):
    """What the gates said of some text states, and what was made of these states meanwhile."""

    strengths: list[Tensor]  # per edit: [rows] or [rows, length], scale included
    levels: list[tuple[float, ...]]  # per edit: the largest strength in each row
    acting: list[bool]  # per edit: whether it acts on any row
    idle: bool  # whether none does
    memo: dict[Any, Any]


@dataclass
class Call:
    """One UNet call: how strongly each edit acts on each row, and which rows each module saw."""

    rows: int
    strengths: list[Tensor]
    levels: list[tuple[float, ...]]
    acting: list[bool]
    idle: bool
    memo: dict[Any, Any]
    entered: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    left: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    thread: int = field(default_factory=get_ident)
    running: bool = True

    def leave(self, path: str, rows: int) -> None:
        """Count rows that leave a module, which must have entered it before."""
        self.left[path] += rows
        if self.left[path] > self.entered[path]:
            raise SilentEditError(f"{path} was left without being entered", STRIPPED)

    def acts(self, index: int) -> bool:
        return self.acting[index]

    def strength(self, index: int, like: Tensor) -> Tensor:
        """Strength of an edit, shaped to multiply `like` [rows, ...]."""
        value = self.strengths[index].to(like.dtype)
        return value.view(*value.shape, *(1,) * (like.ndim - value.ndim))

    def once(self, key: tuple, text: Tensor, make: Callable[[Call, Tensor], Any]) -> Any:
        """What `make` makes of the text states, once a text: all cross-attentions read the same.

        The text is kept beside the value, so that its id in the key stays its own. Made anew while
        gradients are recorded, where checkpointing must replay every operation.
        """
        if torch.is_grad_enabled():
            return make(self, text)
        key = (*key, id(text))
        if key not in self.memo:
            if len(self.memo) >= MEMO_LIMIT:  # every module reads a copy of its own, as under offloading
                self.memo.clear()
            self.memo[key] = (text, make(self, text))
        return self.memo[key][1]


class Ledger:
    """Opens a `Call` when the UNet is entered, closes it when it is left, and keeps the receipt."""

    def __init__(self, edits: Iterable[Edit]) -> None:
        self.edits = tuple(edits)
        self.receipt = Receipt(self.edits)
        self._entries: list[str] = []
        self._exits: list[str] = []
        self._call: Call | None = None
        self._timeless = not any(g.kind in TIMED for edit in self.edits for g in edit.gates)
        self._text: tuple[Tensor, int] | None = None  # what the last reading of the gates was of
        self._reading = Reading([], [], [], True, {})

    def watch(self, path: str, exits: bool) -> None:
        """Expect every row of every call at this module: going in and, if asked, going out."""
        self._entries.append(path)
        if exits:
            self._exits.append(path)

    @property
    def call(self) -> Call:
        if self._call is None:
            raise RefusedError("an edited module was run outside its UNet", "call the UNet as a whole")
        return self._call

    def begin(self, states: Tensor, timestep: Any, rows: int) -> None:
        """Read the gates for text states [rows, length, width] and one timestep or [rows]."""
        if self._call and self._call.running and self._call.thread != get_ident():
            raise RefusedError(
                "two threads run one erased UNet at once",
                "let them take turns, or give each a deepcopy of the pipeline",
            )
        if len(states) != rows:
            raise RefusedError(
                f"the UNet was given {rows} rows and text for {len(states)}", "give one text a row"
            )
        if not self._same_text(states):
            self._reading = self._read(states, timestep, rows)
            lasting = self._timeless and not torch.is_grad_enabled() and not states.is_inference()
            self._text = (states, states._version) if lasting else None
        self._call = Call(rows, *self._reading)

    def enter(self, path: str, rows: int) -> Call:
        """The call in which these rows enter a module, with them counted."""
        call = self.call
        call.entered[path] += rows
        if call.running and call.entered[path] > call.rows:
            raise _missed(path, call.entered[path], call.rows)
        return call

    def _same_text(self, states: Tensor) -> bool:
        """Whether these are the very text states of the last call, unwritten since.

        A sampler asks with the same text at every step; gates that do not read the timestep, and what
        the cross-attentions made of the text, then hold as they were.
        """
        if self._text is None or torch.is_grad_enabled():
            return False
        text, version = self._text
        return states is text and states._version == version

    def _read(self, states: Tensor, timestep: Any, rows: int) -> Reading:
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(rows)
        signal = Signal(states.detach(), times.to(states.device))
        strengths = [edit.scale * factor(edit, signal) for edit in self.edits]
        levels = [tuple(value.abs().reshape(rows, -1).amax(1).tolist()) for value in strengths]
        acting = [any(level) for level in levels]
        return Reading(strengths, levels, acting, not any(acting), {})

    def finish(self) -> None:
        """Every watched module must have seen every row exactly once."""
        call = self.call
        self.abandon()
        for paths, seen in ((self._entries, call.entered), (self._exits, call.left)):
            for path in paths:
                if seen[path] != call.rows:
                    raise _missed(path, seen[path], call.rows)
        self.receipt.calls += 1
        self.receipt.rows += call.rows
        for tally, levels in zip(self.receipt.tallies, call.levels, strict=True):
            opened = [row for row, level in enumerate(levels) if level > 0]
            tally.opened.update(opened)
            tally.shut += call.rows - len(opened)

    def abandon(self) -> None:
        """Close the call of this thread; kept under gradients, for checkpointing runs modules again."""
        if self._call and self._call.thread == get_ident():
            self._call.running = False
            self._call = self._call if torch.is_grad_enabled() else None


def _missed(path: str, seen: int, rows: int) -> SilentEditError:
    return SilentEditError(f"{path} saw {seen} of {rows} rows, so its edit did not run", STRIPPED)
