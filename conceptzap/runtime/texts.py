"""Edits in the text encoders: hooks and books of their own, and the proof that they made what is drawn.

A text is encoded before the UNet runs, perhaps long before and by somebody else. So it is not enough that
every edited layer sees every row of every encoder call, which the books of a `Ledger` say as they do for
the UNet: the states that a UNet call is given must be ones that the encoders made under these very edits.
They are known by their content, row for row (a long prompt by its parts). States that were handed in from
elsewhere, or weighted by hand, are refused; rows of zeros say nothing and pass.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptzap.base import Base, Model
from conceptzap.base.modules import encoder_of, find_module, is_text, plain
from conceptzap.edit import Edit
from conceptzap.errors import MismatchError, RefusedError, SilentEditError
from conceptzap.runtime import adapters, ops
from conceptzap.runtime.hooks import Hook, LayerHook, Site, owner
from conceptzap.runtime.ledger import Ledger
from conceptzap.runtime.receipt import STRIPPED
from conceptzap.words import with_article

LIMIT = 2**16  # rows that are known, of each encoder under each set of edits
NORM = "final_layer_norm"  # diffusers' `clip_skip` puts earlier states through it, outside of the encoder
LINEAR = "weights of linear layers and token embeddings"


def of_text(edit: Edit) -> bool:
    return any(map(is_text, edit.sites))


def places(edit: Edit) -> set[int]:
    """The text encoders that an edit is in, from 0."""
    return {encoder_of(site) for site in edit.sites if is_text(site)}


def within(edit: Edit, place: int) -> Edit:
    """The edit at those of its sites that are in one text encoder."""
    return dataclasses.replace(edit, sites=tuple(site for site in edit.sites if encoder_of(site) == place))


def check(edit: Edit, model: Model | nn.Module) -> None:
    """Raise `MismatchError` unless an edit of the text encoders is one that can be, and fits these."""
    if edit.op != "weight" or edit.params or not all(map(is_text, edit.sites)):
        message = f"an edit {edit.op!r} like this cannot stand in a text encoder"
        raise MismatchError(message, f"it takes {LINEAR}")
    if edit.gates:
        raise MismatchError(
            "an edit of a text encoder stands behind a gate, which reads what the encoder makes",
            "make the erasure again, without a gate",
        )
    for site in edit.sites:
        module = find_module(model, site)
        if isinstance(module, nn.Embedding):
            _check_table(edit, module, site)
        elif isinstance(module, nn.Linear):
            ops.check(edit, module, site)
        else:
            kind = with_article(type(module).__name__)
            raise MismatchError(f"{site} is {kind}, which no erasure changes", f"use {LINEAR}")


def _check_table(edit: Edit, table: nn.Embedding, site: str) -> None:
    """An embedding table [tokens, d], to which textual inversion may have added rows since."""
    rows, width = table.weight.shape
    t = {slot: tuple(tensor.shape) for slot, tensor in edit.tensors.items()}
    first = t.get("up", t.get("delta", (rows, 0)))[0]
    sides = {slot: t[slot][0 if slot == "into" else 1] for slot in ("into", "down", "delta") if slot in t}
    fits = not t.keys() - {"up", "down", "into", "delta"} and set(sides.values()) == {width}
    if not site.endswith(".token_embedding") or first > rows or not fits:
        raise MismatchError(
            f"the erasure's change does not fit {site} of {rows} tokens, {width} wide",
            "the erasure was made for another architecture",
        )


def baked(base: Base, edits: Iterable[Edit]) -> tuple[Base, tuple[Edit, ...]]:
    """A base of text encoders with their edits in the weights, copies of its own, and the other edits."""
    given = tuple(edit for edit in edits if edit.scale)
    mine = [edit for edit in given if of_text(edit)]
    if not mine:
        return base, given
    for edit in mine:
        check(edit, base)
    changed = {place for edit in mine for place in places(edit)}
    encoders = [copy.deepcopy(one) if n in changed else one for n, one in enumerate(base.text_encoders)]
    made = dataclasses.replace(base, text_encoders=tuple(encoders))
    for site in dict.fromkeys(site for edit in mine for site in edit.sites):
        weight = find_module(made, site).weight
        change = ops.weight_delta([e for e in mine if site in e.sites], find_module(base, site))
        weight.data = (weight.data.float() + change).to(weight.dtype)
    return made, tuple(edit for edit in given if not of_text(edit))


# what an encoder makes


class Made:
    """The rows that one encoder has made under one set of edits, by their content."""

    def __init__(self) -> None:
        self._marks: dict[bytes, None] = {}

    def add(self, states: Tensor, dtype: torch.dtype) -> None:
        for mark in _marks(states, dtype):
            self._marks.pop(mark, None)
            self._marks[mark] = None
        while len(self._marks) > LIMIT:
            del self._marks[next(iter(self._marks))]

    def knows(self, states: Tensor, dtype: torch.dtype, length: int) -> bool:
        """Whether all rows [n, ...] are known, or all parts of `length` positions; what is zero passes."""
        parts = states.split(length, 1) if states.ndim == 3 else (states,)
        return self._has(states, dtype) or all(self._has(part, dtype) for part in parts)

    def _has(self, states: Tensor, dtype: torch.dtype) -> bool:
        spoken = states.detach().flatten(1).any(1)
        return self._marks.keys() >= set(_marks(states[spoken], dtype))


def _marks(states: Tensor, dtype: torch.dtype) -> list[bytes]:
    """A digest of each row [n, ...], in the UNet's dtype, which is how it reads them."""
    rows = states.detach().to(dtype).cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


_MADE: WeakKeyDictionary[nn.Module, dict[frozenset[str], Made]] = WeakKeyDictionary()


class Books:
    """One text encoder under edits: the ledger of its calls, and what it has made.

    `width` is that of its states; `pooled` says whether the UNet is given its pooled text, too.
    """

    def __init__(
        self, encoder: nn.Module, edits: Sequence[Edit], dtype: torch.dtype, only: Tensor | None
    ) -> None:
        self.ledger = Ledger(edits, only, encoder=True)
        self.encoder, self.dtype = encoder, dtype
        self.width = encoder.config.hidden_size
        self.length = encoder.config.max_position_embeddings
        self.pooled = hasattr(encoder, "text_projection")
        under = frozenset(edit.name for edit in edits)
        # what was made with some edits in some rows is of no use to anybody else
        self.inside = False  # whether a call of the encoder is running
        self.made = Made() if only is not None else _MADE.setdefault(encoder, {}).setdefault(under, Made())

    def check(self, states: Tensor, pooled: Tensor | None) -> None:
        """Raise `RefusedError` unless this encoder has made the states [rows, length, width] of its own."""
        known = self.made.knows(states, self.dtype, self.length)
        if self.pooled and pooled is not None:
            known = known and self.made.knows(pooled, self.dtype, self.length)
        if not known:
            raise RefusedError(
                "the UNet was given text states that the erased text encoder did not make",
                "hand in prompts, or embeddings that it encoded while the erasure was on, as they are",
            )


class EncoderHook(Hook):
    """Opens and closes the books of one call of a text encoder, and remembers what it made."""

    writes = whole = True

    def __init__(self, books: Books) -> None:
        self.books, self.ledger = books, books.ledger

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = adapters.given("the text encoder", args, kwargs)  # [rows, length]
        if not any(owner(hook) is self for hook in module._forward_hooks.values()):
            raise SilentEditError("the hook that checks every call of a text encoder is gone", STRIPPED)
        self.ledger.begin(ids, 0, ids)
        self.books.inside = True

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.books.inside = False
        if output is None:
            self.ledger.abandon()
            return
        self.ledger.finish()
        for tensor in _tensors(output):
            self.books.made.add(tensor, self.books.dtype)


def _tensors(output: Any) -> Iterator[Tensor]:
    """All states [rows, length, d] and pooled texts [rows, d] in an encoder's output."""
    values = output.values() if hasattr(output, "values") else output
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


class NormHook(Hook):
    """At the norm behind the last layer: what it makes of known states is known, too."""

    writes = True

    def __init__(self, books: Books) -> None:
        self.books, self.given = books, None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.given = adapters.given(NORM, args, kwargs)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x, self.given, books = self.given, None, self.books
        if not books.inside and x is not None and books.made.knows(x, books.dtype, books.length):
            books.made.add(output, books.dtype)


class TableHook(Hook):
    """At an embedding table [tokens, d]: y + s dW[ids], rows that were added since left as they are."""

    writes = True

    def __init__(self, ledger: Ledger, path: str, edits: Iterable[int]) -> None:
        self.ledger, self.path, self.edits = ledger, path, frozenset(edits)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.ledger.enter(self, len(adapters.given(self.path, args, kwargs)))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        call = self.ledger.call
        call.leave(self, len(output))
        total = output  # [rows, length, d]
        for index in sorted(call.among(self.edits)):
            ids = adapters.given(self.path, args, kwargs)
            change = looked_up(self.ledger.parts[index], ids, output)
            strength = call.strength((index,), change)
            total = total + ops.weigh(None if strength is None else strength[..., 0], change)
        return None if total is output else total


def looked_up(part: ops.Part, ids: Tensor, y: Tensor) -> Tensor:
    """dW[ids] [rows, length, d] of a table whose own answer is y; zeros for ids that dW has no row for."""
    if "into" in part.edit.tensors:  # dW = W into down
        return F.linear(F.linear(y, part.slot("into", y).T), part.slot("down", y).T)
    name = "up" if "up" in part.edit.tensors else "delta"
    table = part.slot(name, y)
    found = F.embedding(ids.clamp(max=len(table) - 1), table)
    found = torch.where((ids < len(table))[..., None], found, 0)
    return found @ part.slot("down", y) if name == "up" else found


class Origins:
    """Checks the text states of UNet calls, each text once, against what the edited encoders have made.

    `books`: place of the encoder -> its own; the others' states may come from anywhere.
    """

    def __init__(self, model: Model | nn.Module, books: Mapping[int, Books]) -> None:
        self.books = books
        encoders = getattr(model, "text_encoders", ())
        self.widths = [plain(encoder).config.hidden_size for encoder in encoders]
        self._last: tuple[Tensor, int, Tensor | None] | None = None

    def check(self, states: Tensor, pooled: Tensor | None) -> None:
        """For states [rows, length, all widths] and the pooled text [rows, d]; raises as `Books.check`."""
        if not self.books or self._same(states, pooled):
            return
        if states.shape[-1] != sum(self.widths):
            raise RefusedError("the UNet was given text states of other encoders", "use the base's own")
        parts = states.split(self.widths, -1)
        for place, books in self.books.items():
            books.check(parts[place], pooled)
        self._last = None if states.is_inference() else (states, states._version, pooled)

    def _same(self, states: Tensor, pooled: Tensor | None) -> bool:
        """Whether these are the very tensors of the last call, unwritten since."""
        if self._last is None or states.is_inference():
            return False
        text, version, beside = self._last
        return states is text and states._version == version and pooled is beside


def layer_hook(books: Books, path: str, module: nn.Module) -> Hook:
    """The hook for the edits at one layer of an encoder."""
    here = [index for index, edit in enumerate(books.ledger.edits) if path in edit.sites]
    if isinstance(module, nn.Embedding):
        return TableHook(books.ledger, path, here)
    return LayerHook(books.ledger, Site(path, here))
