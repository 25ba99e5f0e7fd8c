"""SLD: diffusers' own pipeline of it draws the same, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import edits
from torch import Tensor

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.attach import attached

STEPS = 10
# diffusers' names -> ours; its warm-up counts steps
SETTINGS = {
    "sld_guidance_scale": "guidance", "sld_threshold": "threshold",
    "sld_momentum_scale": "momentum", "sld_mom_beta": "beta",
}  # fmt: skip


def theirs(
    base: Base, prompts: list[str], seeds: list[int], warmup: int, numbers: dict[str, float]
) -> Tensor:
    """The latents at the end of `StableDiffusionPipelineSafe`, with the concept "cat"."""
    from diffusers import StableDiffusionPipelineSafe

    parts: dict[str, Any] = {
        name: value for name, value in base.pipeline().components.items() if value is not None
    }
    pipe = StableDiffusionPipelineSafe(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.safety_concept = "cat"
    pipe.set_progress_bar_config(disable=True)
    last: list[Tensor] = []
    pipe(
        prompts, latents=base.noise(seeds), num_inference_steps=STEPS, guidance_scale=4.0, output_type="np",
        callback=lambda step, t, latents: last.append(latents.clone()), sld_warmup_steps=warmup,
        **{theirs: numbers[ours] for theirs, ours in SETTINGS.items()},
    )  # fmt: skip
    assert len(last) == STEPS
    return last[-1]


@pytest.mark.parametrize(("warmup", "momentum"), [(0, 0.5), (3, 0.3)])
@torch.no_grad()
def test_it_draws_what_diffusers_draws(sd1: Base, warmup: int, momentum: float) -> None:
    prompts, seeds = ["a cat", "a red car"], [1, 2]
    numbers = {"guidance": 20.0, "threshold": 0.02, "momentum": momentum, "beta": 0.4}
    (edit,) = edits(sd1, "sld", **numbers, warmup=warmup / STEPS)
    noise, look = sd1.noise(seeds), Settings(steps=STEPS, guidance=4.0, batch=2)

    def ours(*acting: Any) -> Tensor:
        with attached(sd1.unet, acting):
            return list(sampler.denoise(sd1, sd1.encode(prompts), sd1.unconditional(), look, noise))[-1][1]

    wanted = theirs(sd1, prompts, seeds, warmup, numbers)
    error, effect = ((found - wanted).abs().max() for found in (ours(edit), ours()))
    assert error < 0.02 * effect and effect > 1e-3 * wanted.abs().max()


def test_a_share_is_one_at_most(sd1: Base) -> None:
    with pytest.raises(UsageError, match="warmup"):
        edits(sd1, "sld", warmup=1.5)
