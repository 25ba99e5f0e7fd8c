"""Erasures on somebody else's diffusers pipeline: all of one UNet behind one set of hooks.

A pipeline with erasures in force is of a class of its own, a subclass that looks the same and asks
before every call whether the parts that the erasures live in are still there. Nothing is patched
outside the object itself.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from conceptzap.base import from_pipeline
from conceptzap.edit import Edit, sort_edits
from conceptzap.errors import RefusedError, UsageError
from conceptzap.report import Report
from conceptzap.runtime.attach import Attachment, Receipt, edits_on, new_run
from conceptzap.runtime.guides import Guidance
from conceptzap.runtime.texts import of_text
from conceptzap.trust import admission
from conceptzap.trust.admission import Asked, Loaded, Source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

ENCODERS = ("text_encoder", "text_encoder_2")
WATCH = "_conceptzap_watch"
# diffusers' pipelines whose UNet calls hold the unconditional rows, then as many conditional ones
HALVED = frozenset(
    f"StableDiffusion{xl}{how}Pipeline"
    for xl in ("", "XL")
    for how in (
        "", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint", "Adapter",
    )
) | {"StableDiffusionDepth2ImgPipeline"}  # fmt: skip


class Handle:
    """Erasures attached to somebody's pipeline; `remove()` takes these off again, bit for bit.

    As a context manager it does so at the end of the block. They stay for every pipeline over the
    same UNet and end with it. They do not travel: what `save_pretrained` writes is the plain base,
    un-erased, without a word. Ship the erasure's file with it, or write the erasure into weights
    with `conceptzap.export`.
    """

    def __init__(self, shared: _Applied, loaded: Sequence[Loaded], strength: float) -> None:
        self._shared = shared
        self._loaded = tuple(loaded)
        self._strength = strength
        self._enabled = True

    def __repr__(self) -> str:
        titles = ", ".join(one.erasure.header.title for one in self._loaded)
        state = "removed" if not self.attached else "on" if self._enabled else "disabled"
        return f"Handle({titles}, strength {self._strength:g}, {state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @property
    def attached(self) -> bool:
        """Whether `remove` has not been called."""
        return any(one is self for one in self._shared.handles)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in force, at their strengths; none while disabled."""
        strengths = [one.strength * self._strength for one in self._loaded]
        pairs = zip(self._loaded, strengths, strict=True) if self._enabled else ()
        return tuple(edit.scaled(strength) for one, strength in pairs for edit in one.erasure.edits)

    @property
    def strength(self) -> float:
        """0 to 2, on top of the strength that each erasure was given by itself; set it to change it."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._put(strength=_together(self._loaded, value), enabled=self._enabled)

    def disable(self) -> None:
        """The plain base until `enable()`, as far as other handles let it be."""
        self._put(strength=self._strength, enabled=False)

    def enable(self) -> None:
        self._put(strength=self._strength, enabled=True)

    def _put(self, strength: float, enabled: bool) -> None:
        """Change both or, where that fails, neither."""
        before = self._strength, self._enabled
        self._strength, self._enabled = strength, enabled
        try:
            self._shared.set(self._shared.handles)
        except BaseException:
            self._strength, self._enabled = before
            self._shared.set(self._shared.handles)
            raise

    def remove(self) -> None:
        """Take these erasures off; those of other `apply` calls stay. Twice does no harm."""
        self._shared.set([one for one in self._shared.handles if one is not self])

    @property
    def receipt(self) -> Receipt | None:
        """Rows and calls since the last change on this UNet; None when nothing is on."""
        return self._shared.attachment.receipt if self._shared.attachment else None


class _Parts(NamedTuple):
    """What erasures are attached to."""

    unet: nn.Module
    text_encoders: tuple[nn.Module, ...]


class _Applied:
    """The handles of one UNet, in force together, and the pipelines that they were applied to.

    `text_encoders` are those of the first of these pipelines, which edits of texts live in.
    """

    def __init__(self, pipe: Any) -> None:
        # what torch.compile wraps may outlive the wrapper
        self._unet, self._plain = weakref.ref(pipe.unet), weakref.ref(_unwrapped(pipe.unet))
        self._encoders = [weakref.ref(encoder) for encoder in _encoders(pipe).values()]
        self._pipes: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
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
        for pipe in list(self._pipes.values()):
            self.watch(pipe)

    def watch(self, pipe: Any) -> None:
        """Let the pipeline check its parts before every call, or no more when nothing is applied."""
        self._pipes[id(pipe)] = pipe
        here: _Watch | None = vars(pipe).get(WATCH)
        plain = self._plain()
        if self.handles and plain is not None:
            names = frozenset(edit.name for edit in self.attachment.edits) if self.attachment else frozenset()
            _guard(pipe, _Watch(names, plain, _encoders(pipe)))
        elif here is not None and here.unet is plain:
            _unguard(pipe)

    def _attach(self) -> None:
        self._detach()
        edits = sort_edits(edit for handle in self.handles for edit in handle.edits if edit.scale)
        unet, encoders = self._unet(), [one() for one in self._encoders]
        unet = self._plain() if unet is None else unet  # whether one that a compiler wraps is true fails
        if edits and unet is not None:
            self.attachment = Attachment(_Parts(unet, tuple(filter(None, encoders))), edits, ours=False)

    def fits(self, pipe: Any) -> bool:
        """Whether a pipeline reads texts with the encoders that edits of texts would live in."""
        here = list(_encoders(pipe).values())
        return len(here) == len(self._encoders) and all(a is b() for a, b in zip(here, self._encoders))

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
    pipe: DiffusionPipeline, erasures: Asked | Iterable[Asked], strength: float, strict: bool
) -> Handle:
    """Admit the erasures on the pipeline's own modules, then attach them; see `api.apply`."""
    single = isinstance(erasures, Source) or _is_pair(erasures)
    loaded = admission.load_all([erasures] if single else erasures)
    strength = _together(loaded, strength)
    if not loaded:
        raise UsageError("no erasure was given to apply", "give a path or an Erasure")
    base = from_pipeline(pipe)
    shared = _APPLIED.get(_unwrapped(pipe.unet)) or _Applied(pipe)
    held = [edit for one in loaded for edit in one.edits] + [e for h in shared.handles for e in h.edits]
    if any(map(of_text, held)) and not shared.fits(pipe):
        raise RefusedError(
            "this pipeline shares its UNet with one of other text encoders, which an erasure changes",
            "apply erasures of the text encoder to pipelines that share all of their parts",
        )
    with shared.suspended():
        admission.admit_all(base, [one.erasure for one in loaded], strict, _Warner())
    handle = Handle(shared, loaded, strength)
    shared.set([*shared.handles, handle])
    shared.watch(pipe)
    _APPLIED[_unwrapped(pipe.unet)] = shared
    return handle


def applied(pipe: DiffusionPipeline) -> tuple[Handle, ...]:
    """The handles of all erasures applied to the pipeline's UNet, first to last; disabled ones, too."""
    watch: _Watch | None = vars(pipe).get(WATCH)
    unet = watch.unet if watch else _unwrapped(getattr(pipe, "unet", None))
    shared = None if unet is None else _APPLIED.get(unet)
    return tuple(shared.handles) if shared else ()


def remove(pipe: DiffusionPipeline) -> None:
    """Take every erasure off the pipeline's UNet, bit for bit; none there is no error."""
    for shared in {id(handle._shared): handle._shared for handle in applied(pipe)}.values():
        shared.set([])


def _together(loaded: Iterable[Loaded], strength: object) -> float:
    """The strength, once it is in range by itself and on top of each erasure's own."""
    number = admission.check_strength(strength)
    for one in loaded:
        admission.check_strength(one.strength * number)
    return number


def _is_pair(value: object) -> bool:
    """Whether it is one erasure with its strength, not a tuple of two erasures."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


# the pipeline, watched


@dataclass(frozen=True)
class _Watch:
    """What a pipeline must still be made of: a UNet that all these edits act on, its text encoders.

    Held by the pipeline itself, so that a deepcopy of it watches its own parts.
    """

    edits: frozenset[str]
    unet: nn.Module = field(repr=False)
    encoders: dict[str, nn.Module] = field(repr=False)

    def check(self, pipe: Any) -> None:
        """Raise `RefusedError` where the pipeline would draw with another part."""
        on = {edit.name for edit in edits_on(pipe.unet) or ()} if pipe.unet is not None else set()
        if not self.edits <= on:
            raise _replaced("unet", "un-erased")
        for name, encoder in _encoders(pipe).items():
            if self.edits and self.encoders.get(name) is not encoder:
                raise _replaced(name, "with words that the erasures may not know")


def _replaced(part: str, how: str) -> RefusedError:
    return RefusedError(
        f"the {part} of this pipeline was replaced after an erasure was applied, so it would draw {how}",
        f"put the {part} back, or call conceptzap.remove(pipe) and apply again",
    )


def _unwrapped(module: Any) -> Any:
    """The module that torch.compile wraps, or itself."""
    return getattr(module, "_orig_mod", module)


def _encoders(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders that are there; without one, embeddings are handed in and judged as they come."""
    found = {name: _unwrapped(getattr(pipe, name, None)) for name in ENCODERS}
    return {name: encoder for name, encoder in found.items() if encoder is not None}


@cache
def _watched(kind: type) -> type:
    """A subclass by the same name that checks before every call."""

    @wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (watch := vars(self).get(WATCH)):
            return kind.__call__(self, *args, **kwargs)
        watch.check(self)
        new_run(watch.unet)
        with _guidance(self, kind):
            return kind.__call__(self, *args, **kwargs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "__call__": __call__, "_conceptzap_plain": kind})


def _guidance(pipe: Any, kind: type) -> AbstractContextManager[None]:
    """Says which rows of the UNet's calls are conditional, where the pipeline is known to tell."""
    from diffusers.guiders import BaseGuidance

    if not kind.__module__.startswith("diffusers."):
        return nullcontext()
    if isinstance(getattr(pipe, "guider", None), BaseGuidance):  # a modular pipeline: a call a prediction
        return Guidance(
            lambda rows: 0 if pipe.guider.is_conditional else rows,
            lambda: getattr(pipe.guider, "guidance_scale", 0) > 1,
        ).told()
    if kind.__name__ in HALVED:
        return Guidance(lambda rows: rows // 2 if pipe.do_classifier_free_guidance else 0).told()
    return nullcontext()


def _guard(pipe: Any, watch: _Watch) -> None:
    if not hasattr(type(pipe), "_conceptzap_plain"):
        pipe.__class__ = _watched(type(pipe))
    vars(pipe)[WATCH] = watch


def _unguard(pipe: Any) -> None:
    vars(pipe).pop(WATCH, None)
    pipe.__class__ = getattr(type(pipe), "_conceptzap_plain", type(pipe))


class _Warner(Report):
    """Warnings as Python's, for those who call from Python."""

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=6)
