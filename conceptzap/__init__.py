"""Erase concepts from Stable Diffusion: a frozen checkpoint, one small file, no concept.

    import conceptzap

    made = conceptzap.erase("Van Gogh", anchors="painting")
    for picture in conceptzap.generate("a cat by Van Gogh", erasures=[made.path]):
        picture.save("cat.png")

Names load on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "api": ("applied", "apply", "erase", "export", "generate", "inspect", "load", "remove", "save", "stack"),
    "edit": ("Edit", "Erasure", "Gate", "Header"),
    "task": ("Task",),
    "result": ("Settings",),
    "errors": ("ConceptZapError",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
