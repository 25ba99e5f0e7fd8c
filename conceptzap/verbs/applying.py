"""Erasures on somebody else's diffusers pipeline: all of one UNet behind one set of hooks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from conceptzap.base import from_pipeline
from conceptzap.edit import Edit, sort_edits
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.runtime.attach import Attachment, Receipt
from conceptzap.trust import admission
from conceptzap.trust.admission import Source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


class Handle:
    """Erasures attached to somebody's pipeline; `remove()` takes these off again, bit for bit.

    They stay for every pipeline over the same UNet and end with it. They do not travel: what
    `save_pretrained` writes is the plain base, un-erased, without a word. Ship the erasure's file
    with it, or write the erasure into weights with `conceptzap.export`.
    """

    def __init__(self, shared: _Applied, edits: Sequence[Edit]) -> None:
        self._shared = shared
        self.edits = tuple(edits)

    def remove(self) -> None:
        """Take these erasures off; those of other `apply` calls stay. Twice does no harm."""
        self._shared.set([one for one in self._shared.handles if one is not self])

    @property
    def receipt(self) -> Receipt | None:
        """Rows and calls since the last `apply` or `remove` on this UNet; None when nothing is on."""
        return self._shared.attachment.receipt if self._shared.attachment else None


class _Applied:
    """The handles of one UNet, in force together."""

    def __init__(self, unet: nn.Module) -> None:
        self._unet = weakref.ref(unet)
        self.handles: list[Handle] = []
        self.attachment: Attachment | None = None

    def set(self, handles: list[Handle]) -> None:
        """Put exactly these in force; where that fails, the ones before stay."""
        before, self.handles = self.handles, handles
        try:
            self._attach()
        except BaseException:
            self.handles = before
            self._attach()
            raise

    def _attach(self) -> None:
        self._detach()
        edits = sort_edits(edit for handle in self.handles for edit in handle.edits)
        unet = self._unet()
        if edits and unet is not None:
            self.attachment = Attachment(unet, edits)

    def _detach(self) -> None:
        if self.attachment:
            self.attachment.remove()
        self.attachment = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The plain UNet for a while."""
        self._detach()
        try:
            yield
        finally:
            self._attach()


_APPLIED: weakref.WeakKeyDictionary[nn.Module, _Applied] = weakref.WeakKeyDictionary()


def apply(
    pipe: DiffusionPipeline, erasures: Source | Iterable[Source], strength: float, strict: bool
) -> Handle:
    """Admit the erasures on the pipeline's own modules, then attach them; see `api.apply`."""
    items = [erasures] if isinstance(erasures, Source) else list(erasures)
    loaded = admission.load_all((item, strength) for item in items)
    if not loaded:
        raise UsageError("no erasure was given to apply", "give a path or an Erasure")
    base = from_pipeline(pipe)
    shared = _APPLIED.get(pipe.unet) or _Applied(pipe.unet)
    with shared.suspended():
        for one in loaded:
            admission.admit(base, one.erasure, strict, _Warner())
    handle = Handle(shared, [edit for one in loaded for edit in one.edits])
    shared.set([*shared.handles, handle])
    _APPLIED[pipe.unet] = shared
    return handle


class _Warner(Report):
    """Warnings as Python's, for those who call from Python."""

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=5)
