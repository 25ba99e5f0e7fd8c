"""Hooks that rest while a UNet call runs in which they have nothing to do.

A text's first call runs with every hook in place, and its books are closed. For as long as the gates say
the same of that very text, a later call in which no edit acts goes through the modules as if nothing were
attached to them but what has to look at the picture; the UNet's own hook counts it. If what it shows opens a
gate, all are there again before it is made anew. Between calls every hook is in place, so that a module
which is run by itself is refused as ever. Hooks of others keep their places before and behind ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Hooks = dict[int, Callable[..., Any]]


class Rest:
    """The hooks inside one model, and those of them that are off just now."""

    def __init__(self) -> None:
        self._places: list[tuple[Hooks, int, bool]] = []  # the last: whether it looks
        self._hooked: set[nn.Module] = set()
        self._around: list[nn.Module] | None = None  # modules that have hooked ones in them
        self._off: list[tuple[Hooks, int, Callable[..., Any], list[int]]] = []

    def add(self, module: nn.Module, handle: RemovableHandle, before: bool, looks: bool) -> None:
        """One more hook, `before` a module or behind it; one that `looks` at pictures changes nothing."""
        hooks = module._forward_pre_hooks if before else module._forward_hooks
        self._places.append((hooks, handle.id, looks))
        self._hooked.add(module)
        self._around = None

    def forget(self) -> None:
        """All of them have been taken off."""
        self._off.clear()
        self._places.clear()

    def allowed(self, model: nn.Module) -> bool:
        """Whether hooks can go unnoticed: a compiled graph would be made without them, and kept."""
        if torch.compiler.is_compiling():
            return False
        if self._around is None:
            self._around = list(_around(model, self._hooked))
        return all(module._compiled_call_impl is None for module in self._around)

    def off(self, looking: bool) -> None:
        """All of them; where gates are `looking`, those stay that look."""
        for hooks, key, looks in self._places:
            if key in hooks and not (looking and looks):
                keys = [] if len(hooks) == 1 else list(hooks)  # mostly there is no other
                behind = keys[keys.index(key) + 1 :] if keys else keys
                self._off.append((hooks, key, hooks.pop(key), behind))

    def on(self) -> None:
        """All of them, each where it stood."""
        while self._off:
            hooks, key, hook, behind = self._off.pop()
            hooks[key] = hook
            for other in behind:
                hooks.move_to_end(other)


def _around(module: nn.Module, hooked: set[nn.Module]) -> Iterator[nn.Module]:
    """The module and those in it that are or have a hooked one."""
    inside = [found for child in module.children() for found in _around(child, hooked)]
    if inside or module in hooked:
        yield module
        yield from inside
