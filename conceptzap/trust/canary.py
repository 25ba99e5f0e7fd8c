"""The self-test in every file: does each edit change each of its modules by as much as when it was made?

`make` runs the UNet once on a fixed latent with the concept's own prompt and notes, for every
module, the size of the change (rms of edited - plain output on the input it got). `check` repeats
that after loading and compares with the stored numbers, so a hook that is missing, doubled or
without effect is found before any picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure, Json
from conceptzap.errors import RefusedError
from conceptzap.runtime.attach import attached, find_module

SEED = 20240319
TIMESTEP = 500
DIGITS = 4
# relative, by the dtype of the UNet: half precision rounds every activation
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.15, torch.bfloat16: 0.3}


class _Watch:
    """Input and output of one module, seen from outside every other hook."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.given: tuple[tuple, dict[str, Any]] = ((), {})
        self.output: Tensor | None = None
        self.handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.given = (args, kwargs)

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.output = output

    def change(self) -> float:
        """rms of what the edits added to the module's own output; call it with the edits off."""
        args, kwargs = self.given
        plain, edited = self.module(*args, **kwargs), self.output
        if edited is None:
            return 0.0
        return (edited[:, : plain.shape[1]] - plain).float().pow(2).mean().sqrt().item()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _timestep(edits: Iterable[Edit]) -> int:
    """A timestep at which every window is open, as far as there is one."""
    windows = [gate.params for edit in edits for gate in edit.gates if gate.kind == "window"]
    low = max([0, *(window["low"] for window in windows)])
    high = min([999, *(window["high"] for window in windows)])
    return min(max(TIMESTEP, low), high)


@torch.no_grad()
def measure(base: Base, edits: Sequence[Edit], prompt: str) -> dict[str, float]:
    """Module path -> rms change, for all modules of the edits, attached together."""
    latents = base.noise([SEED])
    sites = sorted({site for edit in edits for site in edit.sites})
    with attached(base.unet, edits):
        watches = {site: _Watch(find_module(base.unet, site)) for site in sites}
        try:
            base.eps(latents, _timestep(edits), base.encode([prompt]))
        finally:
            for watch in watches.values():
                watch.remove()
    return {site: watch.change() for site, watch in watches.items()}


def make(base: Base, edits: Sequence[Edit], prompt: str) -> dict[str, Json]:
    """The header's canary of edits that belong together, keyed by the name of the first of them.

    Raises `RefusedError` if one of them changes nothing for the concept's own prompt.
    """
    changes = {site: _round(value) for site, value in measure(base, edits, prompt).items()}
    idle = [site for site, value in changes.items() if not value > 0]
    if idle:
        raise RefusedError(
            f"the edit changes nothing at {idle[0]} for the prompt {prompt!r}",
            "its gate stays shut or it was not trained; try more --steps or another concept",
        )
    names = sorted(edit.name for edit in edits)
    return {names[0]: {"edits": names, "prompt": prompt, "seed": SEED, "change": changes}}


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def check(base: Base, erasure: Erasure, *, exact: bool = True) -> None:
    """Raise `RefusedError` unless every edit of a loaded erasure acts here as its canary says.

    `exact` False, for another checkpoint of the architecture, only asks that each one acts.
    """
    by_name = {edit.name: edit for edit in erasure.edits}
    # a test that names no edits tests none: the format lets very old files hold such ones
    tests = [test for test in erasure.header.canary.values() if "edits" in test]
    covered = {name for test in tests for name in test["edits"]}
    if missing := sorted(set(by_name) - covered):
        raise RefusedError(
            f"{erasure.header.title!r} has no self-test for its edit {missing[0]}",
            "make the file again with this version of conceptzap",
        )
    tolerance = TOLERANCE.get(base.dtype, 0.3)
    for test in tests:
        edits = [by_name[name] for name in test["edits"] if name in by_name]
        _compare(measure(base, edits, test["prompt"]), test["change"], tolerance if exact else None)


def _compare(found: Mapping[str, float], wanted: Mapping[str, float], tolerance: float | None) -> None:
    for site in sorted({*found, *wanted}):
        have, value = found.get(site, 0.0), wanted.get(site, 0.0)
        same = tolerance is None or math.isclose(have, value, rel_tol=tolerance)
        if not (same and have > 0):
            raise RefusedError(
                f"self-test failed at {site}: its output changed by {have:.4g}, {value:.4g} was expected",
                "something disturbs the model; load it afresh and attach again",
            )
