"""Attach edits to a UNet by hooks on named modules, and prove at every call that each one ran.

One set of hooks per module, in fixed phases (weight, adapter, tokens) that all read the same input,
so the order of edits cannot matter.

A call no edit is open for goes through untouched, bit for bit. Where some rows of a call are open
and others shut, as in a classifier-free batch, the learned rows are masked out of the shut ones,
which then equal the base within rounding. (Running each group of rows on its own keeps the bits of
every row, but costs a fifth of the sampling time on a small UNet.)

Text is what edits read. Image prompts (IP-Adapter) and grounding (GLIGEN) bring keys and values of
their own and are refused. The residuals of a ControlNet or T2I-Adapter are added to the activations
beside the text: every edit acts as it does without them, but a control image may itself show the
concept, and nothing here looks at images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.base import PREFIX, Model, find_module
from conceptzap.base.modules import encoder_of, plain, unet_of
from conceptzap.edit import Edit
from conceptzap.errors import MismatchError, RefusedError, SilentEditError
from conceptzap.runtime import adapters, gates, guides, ops, sight, texts
from conceptzap.runtime.hooks import (
    CrossHook,
    Hook,
    LayerHook,
    SightHook,
    Site,
    UNetHook,
    owner,
)
from conceptzap.runtime.ledger import Ledger
from conceptzap.runtime.receipt import STRIPPED, Receipt


class Attachment:
    """Edits hooked into a base, or a bare UNet, until `remove()`. Use `attached` where a block is enough.

    Those of strength 0 are left out. `only` [edits, rows], 1 or 0, confines each edit to some rows of
    every call, those of the text encoders, too; the edits must all be of some strength then. `ours`: the
    UNet is called by nobody but conceptzap, which says which rows are unconditional; elsewhere a pipeline
    has to (`Guidance`).
    """

    def __init__(
        self,
        model: Model | nn.Module,
        edits: Iterable[Edit],
        only: Tensor | None = None,
        ours: bool = True,
    ) -> None:
        self.edits = tuple(edit for edit in edits if edit.scale)
        self._ledger = Ledger(self.edits, only, ours)
        self._books: dict[int, texts.Books] = {}  # place of a text encoder that is edited -> its own
        self._handles: list[Any] = []
        self._placed: list[tuple[nn.Module, Hook, Ledger | None]] = []  # where hooks belong
        unet = unet_of(model)
        encoders = getattr(model, "text_encoders", ())
        self._compiled = any(map(_is_compiled, (unet, *encoders)))
        try:
            self._install(model, plain(unet), only)
            self._forget_graphs()
        except BaseException:
            self.remove()
            raise

    @property
    def receipt(self) -> Receipt:
        return self._ledger.receipt

    def check_ran(self) -> None:
        """Raise `SilentEditError` if nothing was run with the edits: the UNet or, for its own, an encoder."""
        encoded = self._books and all(books.ledger.receipt.calls for books in self._books.values())
        of_text = all(map(texts.of_text, self.edits))
        if self.edits and not self.receipt.calls and not (of_text and encoded):
            raise SilentEditError("edits were attached but the UNet was never run with them", STRIPPED)

    def remove(self) -> None:
        """Take every hook off; UNet and text encoders are bit for bit what they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ledger.rest.forget()
        self._forget_graphs()

    def restore(self) -> None:
        """Put the hooks that `remove` took off back, as they were; the receipt goes on."""
        if not self._handles:
            for placed in self._placed:
                self._register(*placed)
            self._forget_graphs()

    def _forget_graphs(self) -> None:
        """Compiled graphs do not notice hooks that come or go, so they must be made anew."""
        if self._compiled:
            torch.compiler.reset()

    def _install(self, model: Model | nn.Module, unet: nn.Module, only: Tensor | None) -> None:
        if edits_on(unet) is not None:
            raise RefusedError(
                "this UNet has erasures attached already",
                "remove them first, or attach all edits together",
            )
        modules = _checked(model, unet, self.edits)
        # 1. the text encoders, by books of their own
        of_text = [texts.of_text(edit) for edit in self.edits]
        for place in sorted({encoder_of(s) for e, t in zip(self.edits, of_text) if t for s in e.sites}):
            self._into_encoder(model, unet, place, only)
        # 2. the UNet: what is at a cross-attention, and what is at any other module
        cross: dict[str, Site] = {}
        inner: dict[str, Site] = {}
        for (tokens, paths), indices in _by_sites(self._ledger.edits).items():
            for path in paths:
                sites = cross if tokens else inner
                sites.setdefault(path, Site(path)).edits.extend(indices)
        for site in (*cross.values(), *inner.values()):
            site.edits.sort()
        if self.edits:
            self._hook(unet, UNetHook(self._ledger, texts.Origins(model, self._books).check))
        for path, site in cross.items():
            around = CrossHook(self._ledger, site)
            self._hook(modules[path], around, self._ledger)
            for letter in "kv":
                part = f"{path}.to_{letter}"
                layer = LayerHook(self._ledger, inner.pop(part, Site(part)), around, letter)
                self._hook(find_module(unet, part), layer, self._ledger)
        for path, site in inner.items():
            self._hook(modules[path], LayerHook(self._ledger, site), self._ledger)
        for path in self._ledger.sight.sites:
            self._hook(find_module(unet, path), SightHook(self._ledger, path), self._ledger)

    def _into_encoder(self, model: Model, unet: nn.Module, place: int, only: Tensor | None) -> None:
        """Hook the edits of one text encoder, each at those of its sites that are there."""
        encoder = plain(model.text_encoders[place])
        if any(isinstance(owner(hook), texts.EncoderHook) for hook in encoder._forward_pre_hooks.values()):
            raise RefusedError("this text encoder has erasures attached already", "remove them first")
        mine = [i for i, edit in enumerate(self.edits) if place in texts.places(edit)]
        here = [texts.within(self.edits[i], place) for i in mine]
        books = texts.Books(encoder, here, unet.dtype, None if only is None else only[mine])
        self._books[place] = books
        self._hook(encoder, texts.EncoderHook(books))
        self._hook(find_module(model, f"text.{place + 1}.{texts.NORM}"), texts.NormHook(books))
        for path in dict.fromkeys(path for edit in here for path in edit.sites):
            module = find_module(model, path)
            self._hook(module, texts.layer_hook(books, path, module), books.ledger)

    def _hook(self, module: nn.Module, hook: Hook, ledger: Ledger | None = None) -> None:
        """Put it on; the ledger, if any, expects every row there."""
        self._placed.append((module, hook, ledger))
        self._register(module, hook, ledger)
        if ledger:
            ledger.watch(hook, hook.writes)

    def _register(self, module: nn.Module, hook: Hook, ledger: Ledger | None) -> None:
        added = [module.register_forward_pre_hook(hook.before, with_kwargs=True)]
        if hook.writes:
            added.append(module.register_forward_hook(hook.after, with_kwargs=True, always_call=hook.whole))
        self._handles += added
        for handle, before in zip(added, (True, False), strict=False):
            if ledger:
                ledger.rest.add(module, handle, before, isinstance(hook, SightHook))


def _is_compiled(unet: nn.Module) -> bool:
    inside = (module._compiled_call_impl is not None for module in unet.modules())
    return hasattr(unet, "_orig_mod") or any(inside)


def edits_on(unet: nn.Module) -> tuple[Edit, ...] | None:
    """The edits in force on a UNet (or on the one that torch.compile wraps), None: none."""
    ledger = _ledger_on(unet)
    return ledger.receipt.edits if ledger else None


def new_run(unet: nn.Module) -> None:
    """Say that what is drawn next is another picture; `sight` gates that are open shut."""
    if ledger := _ledger_on(unet):
        ledger.sight.new_run()


def _ledger_on(unet: nn.Module) -> Ledger | None:
    hooks = map(owner, getattr(getattr(unet, "_orig_mod", unet), "_forward_pre_hooks", {}).values())
    return next((hook.ledger for hook in hooks if isinstance(hook, UNetHook)), None)


def _by_sites(edits: Sequence[Edit]) -> dict[tuple[bool, tuple[str, ...]], list[int]]:
    """Indices of the edits that are at the same modules: at cross-attentions or not, paths -> indices."""
    groups: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
    for index, edit in enumerate(edits):
        # the UNet's own hook lets guides steer, text encoders have hooks of their own
        if edit.op != "guide" and not texts.of_text(edit):
            groups.setdefault((edit.op == "tokens", edit.sites), []).append(index)
    return groups


def _checked(
    model: Model | nn.Module, unet: nn.Module, edits: Sequence[Edit]
) -> dict[str, nn.Module]:
    """Path -> module for all sites in the UNet; raises `MismatchError` unless every edit and gate fits."""
    modules: dict[str, nn.Module] = {}
    alike: set[tuple] = set()
    gates_seen: set[str] = set()
    for edit in edits:
        if texts.of_text(edit):
            texts.check(edit, model)
            continue
        _check_gates(unet, edit, gates_seen)
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in edit.tensors.items())
        kind = (edit.op, edit.sites, adapters.reads_output(edit), adapters.writes_input(edit), shapes)
        if kind in alike:  # of a thousand files most are made alike
            continue
        if edit.op == "guide":
            guides.check(edit, unet)
            continue
        for path in edit.sites:
            if path not in modules:
                modules[path] = find_module(unet, path)
            (adapters if adapters.is_adapter(edit) else ops).check(edit, modules[path], path)
        alike.add(kind)
    return modules


def _check_gates(unet: nn.Module, edit: Edit, seen: set[str]) -> None:
    for gate in edit.gates:
        if gate.name in seen:
            continue
        if gate.kind == gates.SIGHT:
            sight.check(gate)
            for path in gate.modules:
                find_module(unet, path)
        else:
            gates.check(gate, unet.config.cross_attention_dim)
        seen.add(gate.name)
    per_position = any(gate.kind == "token" for gate in edit.gates)
    if not per_position:
        return
    if edit.op != "weight" or not all(s.endswith((".attn2.to_k", ".attn2.to_v")) for s in edit.sites):
        raise MismatchError(
            f"a 'token' gate cannot stand on the op {edit.op!r} at this site",
            "it belongs on weight edits of attn2.to_k and attn2.to_v",
        )


@contextmanager
def attached(
    model: Model | nn.Module, edits: Iterable[Edit], only: Tensor | None = None
) -> Iterator[Receipt]:
    """Hooks in place inside the block; bit-exact restoration after it. Edits that are `installed` act, too.

    `model` is a base or, for edits that are all in the UNet, a UNet. Raises `SilentEditError` when the block
    ends well although nothing ran with the edits.
    """
    with _lifted(model) as under:
        if under and only is not None:
            only = torch.cat([only.new_ones(len(under), only.shape[1]), only])
        attachment = Attachment(model, (*under, *edits), only)
        try:
            yield attachment.receipt
        finally:
            attachment.remove()
    attachment.check_ran()


# what is in force already


@dataclass
class _Installed:
    """Edits on a model for a whole block, by an attachment that steps aside for a larger one."""

    model: Model | nn.Module
    edits: tuple[Edit, ...]
    attachment: Attachment


_INSTALLED: ContextVar[_Installed | None] = ContextVar("installed", default=None)


@contextmanager
def installed(model: Model | nn.Module, edits: Iterable[Edit]) -> Iterator[None]:
    """Edits in force for the whole block, alone and together with whatever is `attached` inside it.

    So that something new learns beside them: the model as it is called inside the block has them.
    """
    if not (more := tuple(edit for edit in edits if edit.scale)):
        yield
        return
    with _lifted(model) as under:
        held = _Installed(model, (*under, *more), Attachment(model, (*under, *more)))
        token = _INSTALLED.set(held)
        try:
            yield
        finally:
            _INSTALLED.reset(token)
            held.attachment.remove()


def installed_on(model: Model | nn.Module) -> tuple[Edit, ...]:
    """The edits of the `installed` block that this is inside of, none outside of one."""
    held = _INSTALLED.get()
    return held.edits if held and unet_of(held.model) is unet_of(model) else ()


@contextmanager
def _lifted(model: Model | nn.Module) -> Iterator[tuple[Edit, ...]]:
    """The installed edits, taken off for as long as somebody attaches them together with more."""
    held = _INSTALLED.get()
    if held is None or unet_of(held.model) is not unet_of(model):
        yield ()
        return
    held.attachment.remove()
    try:
        yield held.edits
    finally:
        held.attachment.restore()


def bake(unet: nn.Module, edits: Iterable[Edit]) -> dict[str, Tensor]:
    """New fp32 weights, parameter name -> tensor, of ungated `weight` edits; nothing is written.

    All changes are taken from the base's own weights before any is added. Raises `RefusedError` for
    an edit that only hooks can express.
    """
    at: dict[str, list[Edit]] = {}
    for edit in edits:
        if edit.op != "weight" or edit.gates or edit.params:
            rows = " for conditional rows" if guides.conditional_only(edit) else ""
            how = " behind a gate" if edit.gates else rows
            raise RefusedError(
                f"an edit {edit.op!r}{how} cannot be baked into weights",
                "load the file with conceptzap instead",
            )
        for site in edit.sites:
            ops.check(edit, find_module(unet, site), site)
            at.setdefault(site, []).append(edit)
    modules = {site: find_module(unet, site) for site in at}
    return {
        f"{site.removeprefix(PREFIX)}.weight": module.weight.detach().float()
        + ops.weight_delta(at[site], module)
        for site, module in modules.items()
    }
