"""The noise schedule of a checkpoint, and diffusers' samplers over it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from conceptzap.base.layout import USABLE
from conceptzap.errors import MismatchError, UsageError

# what Stable Diffusion means where a config does not say: its pictures are not clipped at any step,
# and its steps begin at 1 and end at the first step's own noise (Rombach et al. 2022, its DDIM code)
STABLE = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
OTHERS = ("EDM", "FlowMatch")  # schedules that are no Stable Diffusion's


def scheduler(config: Mapping[str, Any], prediction: str, sampler: str = "ddim") -> Any:
    """A fresh diffusers scheduler, by the config of this or of another kind of scheduler.

    What the config says holds. What it leaves open is diffusers' own default if it is a config of
    the very kind, as diffusers would draw, and else what Stable Diffusion means (`STABLE`).
    """
    import diffusers

    if sampler not in SAMPLERS:
        raise UsageError(f"no sampler is called {sampler!r}", f"known: {', '.join(SAMPLERS)}")
    kind = config.get("_class_name", SAMPLERS[sampler])
    if kind.startswith(OTHERS):
        raise MismatchError(f"{kind} is no noise schedule of Stable Diffusion", USABLE)
    # diffusers notes which values nobody gave, in the config of a live scheduler
    unsaid = config.get("_use_default_values", ())
    said = {name: value for name, value in config.items() if name not in unsaid}
    known = (STABLE if kind != SAMPLERS[sampler] else {}) | said | {"prediction_type": prediction}
    cls = getattr(diffusers, SAMPLERS[sampler])
    taken = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in known.items() if name in taken})
