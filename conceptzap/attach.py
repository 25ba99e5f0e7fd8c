"""Attach edits to a UNet by hooks on named modules, and prove at every call that each one ran.

One set of hooks per module, in fixed phases (weight, adapter, tokens) that all read the same input,
so the order of edits cannot matter. Attention processors are left alone: they are replaced silently
by attention slicing, xformers and others, a hook on the module is not.

A call no edit is open for goes through untouched, bit for bit. Where some rows of a call are open
and others shut, as in a classifier-free batch, the learned rows are masked out of the shut ones,
which then equal the base within rounding. (Running each group of rows on its own keeps the bits of
every row, but costs a fifth of the sampling time on a small UNet.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap import ops
from conceptzap.edit import Edit
from conceptzap.errors import MismatchError, RefusedError, SilentEditError
from conceptzap.gates import Signal, factor

PREFIX = "unet."
STRIPPED = (
    "something replaced or bypassed the module: fused QKV projections, a rebuilt layer, or a"
    " compiled graph from before attaching; undo it and attach again"
)


def find_module(unet: nn.Module, site: str) -> nn.Module:
    """The module at `site` ("unet....."), below any LoRA wrapper; `MismatchError` if there is none."""
    try:
        module = unet.get_submodule(site.removeprefix(PREFIX))
    except AttributeError:
        module = None
    if module is None or not site.startswith(PREFIX):
        raise MismatchError(f"this base has no module {site}", "use the base it was made for")
    return getattr(module, "base_layer", module)


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


@dataclass
class _Call:
    """One UNet call: how strongly each edit acts on each row, and which rows each module saw."""

    rows: int
    strengths: list[Tensor]  # per edit: [rows] or [rows, length], scale included
    levels: list[tuple[float, ...]]  # per edit: the largest strength in each row
    seen: Counter[str] = field(default_factory=Counter)
    memo: dict[Any, Any] = field(default_factory=dict)

    def acts(self, index: int) -> bool:
        return any(self.levels[index])

    def strength(self, index: int, like: Tensor) -> Tensor:
        """Strength of an edit, shaped to multiply `like` [rows, ...]."""
        value = self.strengths[index].to(like.dtype)
        return value.view(*value.shape, *(1,) * (like.ndim - value.ndim))

    def once(self, key: Any, text: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` makes of the text states, once a call: all cross-attentions read the same text.

        The text is kept beside the value, so that its id in the key stays its own. Made anew while
        gradients are recorded, where checkpointing must replay every operation.
        """
        if torch.is_grad_enabled():
            return make()
        key = (*key, id(text))
        if key not in self.memo:
            self.memo[key] = (text, make())
        return self.memo[key][1]


@dataclass
class _Site:
    """One hooked module: its path and the indices of the edits that act on it."""

    path: str
    edits: list[int] = field(default_factory=list)


class Attachment:
    """Edits hooked into a UNet until `remove()`. Use `attached` where a block is enough."""

    def __init__(self, unet: nn.Module, edits: Iterable[Edit]) -> None:
        self.edits = tuple(edit for edit in edits if edit.scale)
        self.receipt = Receipt(self.edits)
        self._call: _Call | None = None
        self._handles: list[Any] = []
        self._watched: set[str] = set()
        try:
            self._install(unet)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook off; the UNet is bit for bit what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _install(self, unet: nn.Module) -> None:
        if any(isinstance(_owner(hook), _UNetHook) for hook in unet._forward_pre_hooks.values()):
            raise RefusedError(
                "this UNet has erasures attached already",
                "remove them first, or attach all edits together",
            )
        cross: dict[str, _Site] = {}
        plain: dict[str, _Site] = {}
        for index, edit in enumerate(self.edits):
            _check_gates(edit)
            for path in edit.sites:
                ops.check(edit, find_module(unet, path), path)
                sites = cross if edit.op == "tokens" else plain
                sites.setdefault(path, _Site(path)).edits.append(index)
        if self.edits:
            self._hook(unet, _UNetHook(self))
        for path, site in cross.items():
            hook = _CrossHook(self, site)
            self._hook(find_module(unet, path), hook, path)
            for letter in "kv":
                inner = f"{path}.to_{letter}"
                projection = plain.pop(inner, _Site(inner))
                self._hook(find_module(unet, inner), _LayerHook(self, projection, hook, letter), inner)
        for path, site in plain.items():
            self._hook(find_module(unet, path), _LayerHook(self, site), path)

    def _hook(self, module: nn.Module, hook: _Hook, path: str = "") -> None:
        self._handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(hook.after, with_kwargs=True))
        if path:
            self._watched.add(path)

    @property
    def call(self) -> _Call:
        if self._call is None:
            raise RefusedError("an edited module was run outside its UNet", "call the UNet as a whole")
        return self._call

    def begin(self, states: Tensor, timestep: Any, rows: int) -> None:
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(rows)
        signal = Signal(states.detach(), times.to(states.device))
        strengths = [edit.scale * factor(edit, signal) for edit in self.edits]
        levels = [tuple(value.reshape(rows, -1).amax(1).tolist()) for value in strengths]
        self._call = _Call(rows, strengths, levels)

    def finish(self) -> None:
        """Every watched module must have seen every row exactly once."""
        call = self.call
        for path in sorted(self._watched):
            if call.seen[path] != call.rows:
                raise SilentEditError(
                    f"{path} saw {call.seen[path]} of {call.rows} rows, so its edit did not run",
                    STRIPPED,
                )
        self.receipt.calls += 1
        self.receipt.rows += call.rows
        for tally, levels in zip(self.receipt.tallies, call.levels, strict=True):
            opened = [row for row, level in enumerate(levels) if level > 0]
            tally.opened.update(opened)
            tally.shut += call.rows - len(opened)


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


class _Hook:
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        raise NotImplementedError


class _UNetHook(_Hook):
    """Opens and closes the books of one UNet call."""

    def __init__(self, owner: Attachment) -> None:
        self.owner = owner

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        states = _text_states(named.get("encoder_hidden_states"))
        if "image_embeds" in (named.get("added_cond_kwargs") or {}):
            _text_states(None)
        self.owner.begin(states, named["timestep"], len(named["sample"]))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.owner.finish()


class _CrossHook(_Hook):
    """At an `attn2`: lengthen context and mask by the learned rows of the open `tokens` edits."""

    def __init__(self, owner: Attachment, site: _Site) -> None:
        self.owner, self.site = owner, site
        self.tokens: tuple[int, ...] = ()  # edits whose rows stand behind the text just now

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        call = self.owner.call
        call.seen[self.site.path] += len(args[0])
        self.tokens = tuple(index for index in self.site.edits if call.acts(index))
        if not self.tokens:
            return None
        args = list(args)
        states = args.pop(1) if len(args) > 1 else kwargs.get("encoder_hidden_states")
        mask = args.pop(1) if len(args) > 1 else kwargs.get("attention_mask")
        states = _text_states(states)
        key = ("context", self.tokens, mask is None)
        longer = call.once(key, states, lambda: self._lengthen(call, states, mask))
        return tuple(args), kwargs | longer

    def _lengthen(self, call: _Call, states: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
        counts = [ops.token_count(self.owner.edits[index]) for index in self.tokens]
        pad = states.new_zeros(len(states), sum(counts), states.shape[2])
        if mask is not None or any(set(call.levels[index]) != {1.0} for index in self.tokens):
            logs = [call.strengths[index].log() for index in self.tokens]
            bias = [log[:, None].expand(-1, n) for log, n in zip(logs, counts, strict=True)]
            mask = states.new_zeros(len(states), 1, states.shape[1]) if mask is None else mask
            mask = torch.cat([mask, torch.cat(bias, 1)[:, None].to(mask)], -1)
        return {"encoder_hidden_states": torch.cat([states, pad], 1), "attention_mask": mask}

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        self.tokens = ()


class _LayerHook(_Hook):
    """At a Linear or Conv2d: input shifts and learned rows before it, output changes after it."""

    def __init__(
        self, owner: Attachment, site: _Site, cross: _CrossHook | None = None, letter: str = ""
    ) -> None:
        self.owner, self.site, self.cross, self.letter = owner, site, cross, letter
        self.of_text = site.path.endswith((".attn2.to_k", ".attn2.to_v"))
        shifts = [ops.shifts_input(owner.edits[index]) for index in site.edits]
        self.shifting = [index for index, moves in zip(site.edits, shifts, strict=True) if moves]
        self.changing = [index for index in site.edits if index not in self.shifting]
        self.text: Tensor | None = None

    def _learned(self) -> list[Edit]:
        return [self.owner.edits[index] for index in self.cross.tokens] if self.cross else []

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        call, x = self.owner.call, args[0]
        call.seen[self.site.path] += len(x)
        learned = self._learned()
        text = x[:, : x.shape[1] - sum(map(ops.token_count, learned))] if learned else x
        self.text = text if self.changing else None
        shifting = tuple(index for index in self.shifting if call.acts(index))
        if not learned and not shifting:
            return None
        if self.of_text:
            tokens = self.cross.tokens if self.cross else ()
            key = ("input", shifting, tokens, self.letter)
            new = call.once(key, x, lambda: self._input(call, x, text, shifting, learned))
        else:
            new = self._input(call, x, text, shifting, learned)
        return (new, *args[1:]), kwargs

    def _input(
        self, call: _Call, x: Tensor, text: Tensor, shifting: tuple[int, ...], learned: list[Edit]
    ) -> Tensor:
        total = text
        for index in shifting:
            moved = ops.shift(self.owner.edits[index], text)
            total = total + call.strength(index, moved) * moved
        rows = [self._prompt(edit, x) for edit in learned]
        return torch.cat([total, *rows], 1) if rows else total

    def _prompt(self, edit: Edit, x: Tensor) -> Tensor:
        """The learned rows in context space; those in K/V space are written after the projection."""
        name = f"prompt_{self.letter}"
        if name not in edit.tensors:
            return x.new_zeros(len(x), ops.token_count(edit), x.shape[2])
        return ops.slot(edit, name, x).expand(len(x), -1, -1)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        call, text, self.text = self.owner.call, self.text, None
        acting = [index for index in self.changing if call.acts(index)]
        learned = self._learned()
        written = any(f"tokens_{self.letter}" in edit.tensors for edit in learned)
        if not acting and not written:
            return None
        length = output.shape[1] - sum(map(ops.token_count, learned)) if learned else None
        base = total = output[:, :length] if learned else output
        for index in acting:
            change = ops.change(self.owner.edits[index], module, text, base)
            total = total + call.strength(index, change) * change
        if not learned:
            return total
        return torch.cat([total, *self._rows(learned, output, length)], 1)

    def _rows(self, learned: list[Edit], output: Tensor, start: int) -> Iterator[Tensor]:
        for edit in learned:
            stop = start + ops.token_count(edit)
            name = f"tokens_{self.letter}"
            if name in edit.tensors:
                yield ops.slot(edit, name, output).expand(len(output), -1, -1)
            else:
                yield output[:, start:stop]
            start = stop


def _check_gates(edit: Edit) -> None:
    per_position = any(gate.kind == "token" for gate in edit.gates)
    on_text = edit.op == "weight" and all(s.endswith((".to_k", ".to_v")) for s in edit.sites)
    if per_position and not on_text:
        raise MismatchError(
            f"a 'token' gate cannot stand on a {edit.op!r} edit of this site",
            "it belongs on weight edits of attn2.to_k and attn2.to_v",
        )


def _text_states(states: Any) -> Tensor:
    if isinstance(states, Tensor):
        return states
    raise RefusedError(
        "the UNet was given no text states that an erasure could read",
        "image prompts (IP-Adapter) bring keys and values of their own, which no erasure covers",
    )


@contextmanager
def attached(unet: nn.Module, edits: Iterable[Edit]) -> Iterator[Receipt]:
    """Hooks in place inside the block; bit-exact restoration after it.

    Raises `SilentEditError` when the block ends well although the UNet never ran with the edits.
    """
    attachment = Attachment(unet, edits)
    try:
        yield attachment.receipt
    finally:
        attachment.remove()
    if attachment.edits and not attachment.receipt.calls:
        raise SilentEditError("edits were attached but the UNet was never run with them", STRIPPED)


def bake(unet: nn.Module, edits: Iterable[Edit]) -> dict[str, Tensor]:
    """New fp32 weights, parameter name -> tensor, of ungated `weight` edits; nothing is written.

    All changes are taken from the base's own weights before any is added. Raises `RefusedError` for
    an edit that only hooks can express.
    """
    totals: dict[str, Tensor] = {}
    for edit in edits:
        if edit.op != "weight" or edit.gates:
            raise RefusedError(
                f"a {'gated ' if edit.gates else ''}{edit.op!r} edit cannot be baked into weights",
                "load the file with conceptzap instead",
            )
        for site in edit.sites:
            module = find_module(unet, site)
            ops.check(edit, module, site)
            name = f"{site.removeprefix(PREFIX)}.weight"
            start = totals[name] if name in totals else module.weight.detach().float()
            totals[name] = start + ops.weight_delta(edit, module)
    return totals
