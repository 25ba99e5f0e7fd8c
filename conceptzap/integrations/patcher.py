"""Erasures on a ModelPatcher, ComfyUI's and Forge's: in force for its clones, absent for all others.

A patcher's clones share one UNet, so nothing stays on it: the wrapper that a patcher has for UNet calls puts
the hooks on for the call and takes them off again. What comes after the wrapper and sets another one would
silence it; therefore every step also ends in a check that the call was counted, which nobody overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from conceptzap import format
from conceptzap.edit import Erasure
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.integrations.original import Erased
from conceptzap.trust import admission

WRAPPER, AFTER = "model_function_wrapper", "sampler_post_cfg_function"
UNCONDITIONAL = 1  # in `cond_or_uncond`


class Wrapper:
    """What the patcher calls in place of its UNet; `inner` is what it would have called before."""

    def __init__(self, model: Any, erasures: Sequence[tuple[Erasure, float]], inner: Any) -> None:
        self.erased, self.inner = Erased(model.diffusion_model, erasures), inner
        self._checked, self._last = 0, float("-inf")
        self._halves = True  # all rows so far were conditional or not
        self._leads = False  # guidance led away from the unconditional rows of the step before

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: clones copy all that a patcher has, but their UNet is one."""
        return self

    def __call__(self, apply_model: Callable[..., Tensor], call: Mapping[str, Any]) -> Tensor:
        noise, given = float(call["timestep"].max()), call["c"]
        if noise > self._last:  # the noise rises where a picture begins
            self.erased.begin()
            self._leads, self._halves = False, True
        self._last = noise
        # a guider with a third text has rows in the middle, which are neither
        self._halves &= max(call["cond_or_uncond"]) <= UNCONDITIONAL
        rows = [one == UNCONDITIONAL for one in call["cond_or_uncond"]]
        with self.erased.acting(rows, given.get("control"), self._leads and self._halves):
            if self.inner is not None:
                return self.inner(apply_model, call)
            return apply_model(call["input"], call["timestep"], **given)

    def after(self, step: Mapping[str, Any]) -> Tensor:
        """The denoised latents as they are, once it is sure that they were made with the edits.

        Only here a step is told its guidance; the first of a picture is taken for one that leads nowhere.
        """
        calls = self.erased.receipt.calls
        if self.erased.edits and calls == self._checked:
            raise SilentEditError(
                "the erasures on this model were passed over in a step",
                "another node set a UNet wrapper after them: put the erasure last",
            )
        self._checked = calls
        guidance = step.get("cond_scale", 0.0)  # older programs do not say
        if self._leads and "cond_scale" in step and guidance < 1:
            raise RefusedError("guidance fell below 1, which draws what it led away from", "keep it above")
        self._leads = guidance > 1
        return step["denoised"]


def put(patcher: Any, erasure: Erasure, strength: float) -> Any:
    """A clone of the patcher with the erasure in force beside those that it has.

    Raises `MismatchError` where it does not fit the UNet and `UsageError` for a strength outside 0 to 2.
    """
    erasure, clone = format.seal(erasure), patcher.clone()
    found = clone.model_options.get(WRAPPER)
    before = found if isinstance(found, Wrapper) else None
    both = {one.digest: (one, strong) for one, strong in (before.erased.erasures if before else ())}
    both[erasure.digest] = erasure, admission.check_strength(strength)
    wrapper = Wrapper(clone.model, list(both.values()), before.inner if before else found)
    after = clone.model_options.get(AFTER, [])
    ours = [isinstance(getattr(one, "__self__", None), Wrapper) for one in after]
    clone.model_options[AFTER] = [one for one, own in zip(after, ours, strict=True) if not own]
    clone.set_model_unet_function_wrapper(wrapper)
    clone.set_model_sampler_post_cfg_function(wrapper.after)
    return clone


def on(patcher: Any) -> Wrapper | None:
    """The wrapper of the erasures that are on a patcher."""
    found = patcher.model_options.get(WRAPPER)
    return found if isinstance(found, Wrapper) else None
