"""Modules by path: `unet.` and what is below it, `text.1.` and `text.2.` for those of the text encoders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import nn

from conceptzap.errors import MismatchError

PREFIX = "unet."
TEXT = re.compile(r"text\.([12])\.(?=.)")
# some versions of transformers have all of an encoder below this, others nothing
_INNER = "text_model."


class Model(Protocol):
    """What edits act on: a `Base`, or a UNet with the text encoders that it is used with, in order."""

    @property
    def unet(self) -> Any: ...

    @property
    def text_encoders(self) -> Sequence[nn.Module]: ...


def is_text(site: str) -> bool:
    """Whether a module is one of a text encoder's."""
    return site.startswith("text.")


def encoder_of(site: str) -> int:
    """The place of the text encoder that a `text.` site is in, from 0; raises like `find_module`."""
    found = TEXT.match(site)
    if not found:
        raise MismatchError(f"this base has no module {site}", "use the base it was made for")
    return int(found[1]) - 1


def unet_of(model: Any) -> Any:
    """The UNet of a base, or a bare one itself."""
    return model.unet if hasattr(model, "text_encoders") else model


def plain(module: Any) -> Any:
    """The module that torch.compile wraps, or itself."""
    return getattr(module, "_orig_mod", module)


def sites(model: Model, pattern: str) -> tuple[str, ...]:
    """Paths of the modules that match a shell pattern, in the UNet's order, then the encoders'."""
    return tuple(path for path in _paths(model) if fnmatchcase(path, pattern))


def _paths(model: Model) -> Iterator[str]:
    yield from (PREFIX + name for name, _ in model.unet.named_modules() if name)
    for number, encoder in enumerate(model.text_encoders, 1):
        names = (name.removeprefix(_INNER) for name, _ in plain(encoder).named_modules())
        yield from (f"text.{number}.{name}" for name in names if name and name != _INNER[:-1])


def find_module(model: Model | nn.Module, site: str) -> nn.Module:
    """The module at `site` of a base or, for one below "unet.", of a UNet; below any LoRA wrapper.

    Raises `MismatchError` if there is none.
    """
    found = next(_found(model, site), None)
    if found is None:
        raise MismatchError(f"this base has no module {site}", "use the base it was made for")
    return getattr(found, "base_layer", found)


def _found(model: Any, site: str) -> Iterator[nn.Module]:
    if site.startswith(PREFIX):
        yield from _below(unet_of(model), [site.removeprefix(PREFIX)])
    elif is_text(site):
        for encoder in list(getattr(model, "text_encoders", ()))[encoder_of(site) :][:1]:
            name = TEXT.sub("", site)
            yield from _below(plain(encoder), [name, _INNER + name])


def _below(module: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    for name in names:
        try:
            yield module.get_submodule(name)
        except AttributeError:
            pass
