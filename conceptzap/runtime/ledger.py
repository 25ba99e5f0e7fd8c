"""The ledger of an attachment: it opens a call, says how strongly each edit acts in it, and closes it.

Every hooked module must see every row of a call come in exactly once, and go out where an edit
writes there. So an edit that something stripped, doubled or went around is found at the end of the
call it was missing in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conceptzap.base.modules import is_text
from conceptzap.edit import Edit
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime import guides
from conceptzap.runtime.gates import Panel, Strengths, Text, by_site
from conceptzap.runtime.ops import Pair, Part, fuse
from conceptzap.runtime.receipt import STRIPPED, Call, Reading, Receipt, Watched
from conceptzap.runtime.rest import Rest
from conceptzap.runtime.sight import Sight


class Ledger:
    """Opens a `Call` when the UNet is entered, closes it when it is left, and keeps the receipt.

    `edits` are those that act, an edit with a curve for each site being one at each; the receipt is of
    those that were given. `only` [edits, rows] confines each of these to some rows of every call (1
    there, 0 elsewhere). `ours`: calls that nobody described are `Base.eps`'s, whose rows are all
    conditional. `encoder`: it is a text encoder that is entered, with token ids in place of states.
    """

    def __init__(
        self, edits: Iterable[Edit], only: Tensor | None = None, ours: bool = True, encoder: bool = False
    ) -> None:
        self.receipt = Receipt(tuple(edits))
        self.edits, owners = by_site(self.receipt.edits)
        self.parts = tuple(map(Part, self.edits))
        self.guides = frozenset(i for i, edit in enumerate(self.edits) if edit.op == "guide")
        texts = [i for i, edit in enumerate(self.edits) if any(map(is_text, edit.sites))]
        self._texts = [] if encoder else texts
        self._partial = [i for i, edit in enumerate(self.edits) if guides.conditional_only(edit)]
        self._split = [i for i, edit in enumerate(self.edits) if "without" in edit.tensors]
        self._only, self._ours = None if only is None else only[list(owners)], ours
        self._unconditional: int | None = 0
        self._leading = 0  # of these rows, if guidance leads away from them
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
        self.rest = Rest()
        self._whole: Reading | None = None  # of the last call, if all hooks saw it and no edit acted

    def watch(self, hook: Watched, exits: bool) -> None:
        """Expect every row of every call at this hook: going in and, if asked, going out."""
        self._entries.append(hook)
        if exits:
            self._exits.append(hook)

    @property
    def call(self) -> Call:
        if self._call is None:
            raise RefusedError("an edited module was run outside its model", "call the model as a whole")
        return self._call

    @property
    def looks(self) -> bool:
        """Whether some gate looks at what this call will show."""
        return self.sight.looking

    def begin(
        self, states: Tensor, timestep: Any, sample: Tensor, model: torch.nn.Module | None = None
    ) -> None:
        """Read the gates for text states [rows, length, width], one timestep or [rows], and latents.

        The hooks inside the `model` may rest in this call; None: they may not.
        """
        rows = len(sample)
        # asking whether it is free and taking it are one step: two threads cannot both get it
        if self._turn.setdefault("thread", get_ident()) != get_ident():
            raise RefusedError(
                "two threads run one erased UNet at once",
                "let them take turns, or give each a deepcopy of the pipeline",
            )
        self.rest.on()  # an interrupted call has left them off
        if len(states) != rows:
            raise RefusedError(
                f"the UNet was given {rows} rows and text for {len(states)}", "give one text a row"
            )
        times = None
        if self._timed:
            times = torch.as_tensor(timestep).detach().float().cpu().reshape(-1).expand(rows)
        below = guides.unconditional(rows, self._ours)
        if (below, leading := guides.leading(below)) != (self._unconditional, self._leading):
            self._unconditional, self._leading, self._text = below, leading, None
        if self._panel.sight:
            self.sight.begin(times, sample, below or 0)
        reading = self._read(states, times)
        self._call = Call(rows, reading, states, times, below or 0, leading)
        if model is not None and reading is self._whole and not torch.is_grad_enabled():
            self._call.resting = self.rest.allowed(model)
            if self._call.resting:
                self.rest.off(self.sight.looking)

    def look(self) -> bool:
        """Let the gates decide on what the call has shown; whether it must be made again, with more edits."""
        if not (self.sight.looking and self.sight.decide(self._said.told)):
            return False
        call = self.call
        if not call.resting:
            self._check_seen(call)
        reading = self._read(call.states, call.times)
        if np.array_equal(reading.levels, call.reading.levels):
            return False
        self.rest.on()
        self._call = Call(call.rows, reading, call.states, call.times, call.unconditional, call.leading)
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
        strengths = guides.in_pairs(strengths, self._split, self._leading)
        if self._only is not None or self._partial:
            strengths = guides.confined(strengths, self._only, self._partial, self._unconditional)
        if self._texts:
            strengths = _spoken(strengths, self._texts, states)
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
        if not call.resting:
            self._check_seen(call)
            self._whole = call.reading if call.idle else None
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
        self.rest.on()
        if self._call:
            self._call.running = False
            self._call = self._call if torch.is_grad_enabled() else None
        del self._turn["thread"]


def refuse_recording() -> None:
    """Raise while a UNet call is recorded: what is kept would run for any text as it did for this one."""
    recording = {
        "torch.jit.trace": torch.jit.is_tracing(),
        "torch.onnx.export": torch.onnx.is_in_onnx_export(),
        # torch 2.6 cannot say; there the gates fail on what export hands them in place of numbers
        "torch.export": getattr(torch.compiler, "is_exporting", bool)(),
    }
    for name, found in recording.items():
        if found:
            raise RefusedError(
                f"{name} of an erased UNet would keep what the erasures did for one prompt, and no more",
                "remove the erasures first, or write ungated ones into the weights with conceptzap.export",
            )


def _missed(path: str, seen: int, rows: int) -> SilentEditError:
    return SilentEditError(f"{path} saw {seen} of {rows} rows, so its edit did not run", STRIPPED)


def _spoken(strengths: Strengths, texts: Sequence[int], states: Tensor) -> Strengths:
    """Strengths where edits of the text encoders are shut for rows of zeros, which nobody has encoded."""
    said = states.detach().flatten(1).any(1).float().cpu()  # [rows]
    rows, levels = strengths.rows.clone(), strengths.levels.clone()  # [edits, rows]
    rows[texts] *= said
    levels[texts] *= said
    return replace(strengths, rows=rows, levels=levels)
