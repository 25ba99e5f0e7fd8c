"""The books of an attachment: what every edit did at every UNet call, and the proof that it ran.

Every hooked module must see every row of a call come in exactly once, and go out where an edit
writes there. So an edit that something stripped, doubled or went around is found at the end of the
call it was missing in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from conceptzap.edit import Edit
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime import guides
from conceptzap.runtime.gates import Panel, Strengths, Text, by_site
from conceptzap.runtime.ops import Pair, Part, fuse
from conceptzap.runtime.sight import Sight

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
        self.memo: dict[tuple, Any] = {}  # made of the strengths
        self.texts: dict[tuple, tuple[Tensor, Any]] = {}  # made of a text, which is kept beside it

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` makes of the strengths alone, made once."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass
class Call:
    """One UNet call: how strongly each edit acts on each row, and which rows each hook saw.

    `states` [rows, length, width] and `times` [rows], on the CPU, are what it was given; `times` is
    None where nothing depends on them. `unconditional`: how many of the rows, from the first.
    `steered`: guides that have been at work. `given`: the arguments, where it may be made anew.
    """

    rows: int
    reading: Reading
    states: Tensor
    times: Tensor | None = None
    unconditional: int = 0
    steered: set[int] = field(default_factory=set)
    given: tuple[tuple, dict[str, Any]] = ((), {})
    entered: dict[Watched, int] = field(default_factory=lambda: defaultdict(int))
    left: dict[Watched, int] = field(default_factory=lambda: defaultdict(int))
    running: bool = True

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
            found = rows[list(indices)].T  # [rows, m]
            return None if not found.requires_grad and bool((found == 1).all()) else found
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
                table = table.repeat_interleave(torch.tensor(times, device=table.device), -1)
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
        gradients are recorded, where checkpointing must replay every operation.
        """
        if torch.is_grad_enabled():
            return make(self, text)
        memo, key = self.reading.texts, (*key, id(text))
        if key not in memo:
            if len(memo) >= MEMO_LIMIT:  # every module reads a copy of its own, as under offloading
                memo.clear()
            memo[key] = (text, make(self, text))
        return memo[key][1]


class Ledger:
    """Opens a `Call` when the UNet is entered, closes it when it is left, and keeps the receipt.

    `edits` are those that act, an edit with a curve for each site being one at each; the receipt is of
    those that were given. `only` [edits, rows] confines each of these to some rows of every call (1
    there, 0 elsewhere). `ours`: calls that nobody described are `Base.eps`'s, whose rows are all
    conditional.
    """

    def __init__(self, edits: Iterable[Edit], only: Tensor | None = None, ours: bool = True) -> None:
        self.receipt = Receipt(tuple(edits))
        self.edits, owners = by_site(self.receipt.edits)
        self.parts = tuple(map(Part, self.edits))
        self.guides = frozenset(i for i, edit in enumerate(self.edits) if edit.op == "guide")
        self._partial = [i for i, edit in enumerate(self.edits) if guides.conditional_only(edit)]
        self._only, self._ours = None if only is None else only[list(owners)], ours
        self._unconditional: int | None = 0
        self._firsts = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
        self._panel = Panel(self.edits)
        self.sight = Sight(list(self._panel.sight.values()))
        timed = self._panel.timed or self._panel.sight
        self._timed = bool(timed) or any("times" in edit.tensors for edit in self.edits)
        self._entries: list[Watched] = []
        self._exits: list[Watched] = []
        self._call: Call | None = None
        self._turn: dict[str, int] = {}  # the thread whose call is running
        self._text: tuple[Tensor, int] | None = None  # what the gates were last read of, if it lasts
        self._said: Text | None = None
        self._reading: Reading | None = None
        self._pairs: dict[tuple, Pair] = {}

    def watch(self, hook: Watched, exits: bool) -> None:
        """Expect every row of every call at this hook: going in and, if asked, going out."""
        self._entries.append(hook)
        if exits:
            self._exits.append(hook)

    @property
    def call(self) -> Call:
        if self._call is None:
            raise RefusedError("an edited module was run outside its UNet", "call the UNet as a whole")
        return self._call

    @property
    def looks(self) -> bool:
        """Whether some gate looks at what this call will show."""
        return self.sight.looking

    def begin(self, states: Tensor, timestep: Any, sample: Tensor) -> None:
        """Read the gates for text states [rows, length, width], one timestep or [rows], and latents."""
        rows = len(sample)
        # asking whether it is free and taking it are one step: two threads cannot both get it
        if self._turn.setdefault("thread", get_ident()) != get_ident():
            raise RefusedError(
                "two threads run one erased UNet at once",
                "let them take turns, or give each a deepcopy of the pipeline",
            )
        if len(states) != rows:
            raise RefusedError(
                f"the UNet was given {rows} rows and text for {len(states)}", "give one text a row"
            )
        times = None
        if self._timed:
            times = torch.as_tensor(timestep).detach().float().cpu().reshape(-1).expand(rows)
        below = guides.unconditional(rows, self._ours) if self._partial else 0
        if below != self._unconditional:
            self._unconditional, self._text = below, None
        if self._panel.sight:
            self.sight.begin(times, sample)
        self._call = Call(rows, self._read(states, times), states, times, below or 0)

    def look(self) -> bool:
        """Let the gates decide on what the call has shown; whether it must be made again, with more edits."""
        if not self.sight.decide():
            return False
        call = self.call
        self._check_seen(call)
        reading = self._read(call.states, call.times)
        if np.array_equal(reading.levels, call.reading.levels):
            return False
        self._call = Call(call.rows, reading, call.states, call.times, call.unconditional)
        return True

    @contextmanager
    def aside(self, states: Tensor) -> Iterator[None]:
        """Inside a call, rows of other texts run beside it: no edit acts on them."""
        none = torch.zeros(len(self.edits), len(states))
        call, self._call = self.call, Call(len(states), Reading(Strengths(none, {}, none)), states)
        try:
            yield
        finally:
            self._call = call

    def enter(self, hook: Watched, rows: int) -> Call:
        """The call in which these rows enter a module, with them counted."""
        call = self.call
        call.entered[hook] += rows
        if call.running and call.entered[hook] > call.rows:
            raise _missed(hook.path, call.entered[hook], call.rows)
        return call

    def pair(self, indices: tuple[int, ...], up: str, like: Tensor) -> Pair:
        """The low-rank pairs of these edits as one; kept, where none of them is trained."""
        parts = [self.parts[index] for index in indices]
        if len(parts) == 1 or any(part.trained for part in parts):
            return fuse(parts, up, like)
        key = (indices, like.device, like.dtype)
        if key not in self._pairs:
            if len(self._pairs) > 2 * len(self._entries):  # two sets of open edits, at every module
                self._pairs.clear()
            with torch.inference_mode(False):  # it may be used where gradients are recorded
                self._pairs[key] = fuse(parts, up, like)
        return self._pairs[key]

    def _read(self, states: Tensor, times: Tensor | None) -> Reading:
        """Text gates once a text, the others at every call; what stays as it was is the same reading.

        A sampler asks with the same text at every step: what the cross-attentions made of it holds
        for as long as no strength changes.
        """
        same = self._same_text(states)
        if same and times is None:
            return self._reading
        if not same:
            self._said = self._panel.text(states)
            lasting = not torch.is_grad_enabled() and not states.is_inference()
            self._text = (states, states._version) if lasting else None
        seen = self.sight.factors if self._panel.sight else None
        strengths = self._panel.strengths(self._said, times, seen)
        if self._only is not None or self._partial:
            strengths = guides.confined(strengths, self._only, self._partial, self._unconditional)
        if not (same and strengths.rows.equal(self._reading.strengths.rows)):
            self._reading = Reading(strengths)
        return self._reading

    def _same_text(self, states: Tensor) -> bool:
        """Whether these are the very text states of the last call, unwritten since."""
        if self._text is None or torch.is_grad_enabled():
            return False
        text, version = self._text
        return states is text and states._version == version

    def finish(self) -> None:
        """Every watched module must have seen every row exactly once."""
        call = self.call
        self.abandon()
        if not call.steered.issuperset(call.among(self.guides)):
            raise SilentEditError("a guide was open and did not steer the prediction", STRIPPED)
        self._check_seen(call)
        levels = call.reading.levels
        split = len(self._firsts) < len(levels)
        self.receipt.add(np.maximum.reduceat(levels, self._firsts) if split else levels)

    def _check_seen(self, call: Call) -> None:
        for hooks, seen in ((self._entries, call.entered), (self._exits, call.left)):
            for hook in hooks:
                if seen[hook] != call.rows:
                    raise _missed(hook.path, seen[hook], call.rows)

    def abandon(self) -> None:
        """Close the call of this thread; kept under gradients, for checkpointing runs modules again."""
        if self._turn.get("thread") != get_ident():
            return
        if self._call:
            self._call.running = False
            self._call = self._call if torch.is_grad_enabled() else None
        del self._turn["thread"]


def _missed(path: str, seen: int, rows: int) -> SilentEditError:
    return SilentEditError(f"{path} saw {seen} of {rows} rows, so its edit did not run", STRIPPED)
