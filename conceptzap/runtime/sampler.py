"""The one denoising loop: DDIM without noise (Song et al. 2021, eq. 12), as a generator.

Whoever needs latents on the way stops early by leaving the loop. Every picture has a generator of
its own; with one picture a UNet call it depends on nothing but prompt, seed and settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import ResourceError
from conceptzap.result import Settings
from conceptzap.runtime.attach import Receipt, attached


@dataclass(frozen=True)
class Drawing:
    """One picture, uint8 [h, w, 3] on the CPU, and which edits were ever open for it."""

    picture: Tensor
    prompt: str
    seed: int
    fired: frozenset[str]


def denoise(
    base: Base, cond: Cond, uncond: Cond, settings: Settings, noise: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield (t, latents [n, c, h, w]) before every UNet call and (-1, latents) at the end.

    `cond` has n rows, `uncond` one or n; with guidance 1 the unconditional half is left out.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(base.scheduler().config, prediction_type="epsilon")
    scheduler.set_timesteps(settings.steps)
    n, guided = len(noise), settings.guidance != 1
    both = Cond.cat([uncond if len(uncond) == n else uncond[[0] * n], cond]) if guided else cond
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps.tolist():
        yield t, latents
        eps = base.eps(latents.repeat(2, 1, 1, 1) if guided else latents, t, both)
        if guided:
            without, given = eps.chunk(2)
            eps = without + settings.guidance * (given - without)
        latents = scheduler.step(eps, t, latents).prev_sample
    yield -1, latents


def drawings(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    edits: Sequence[Edit] = (),
) -> Iterator[Drawing]:
    """Draw prompt i with seed i, `settings.batch` pictures a UNet call, under the edits.

    The receipt of every batch is verified before its latents are decoded: raises `SilentEditError`
    and makes no picture where an edit did not run, `ResourceError` where the latents diverged.
    """
    uncond = base.encode([settings.negative])
    for start in range(0, len(prompts), settings.batch):
        chunk = slice(start, start + settings.batch)
        latents, receipt = _batch(base, prompts[chunk], seeds[chunk], settings, edits, uncond)
        pictures = base.decode(latents)
        for row, picture in enumerate(pictures):
            fired = _fired(receipt, row, len(pictures))
            yield Drawing(picture, prompts[start + row], seeds[start + row], fired)


@torch.no_grad()
def _batch(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    edits: Sequence[Edit],
    uncond: Cond,
) -> tuple[Tensor, Receipt]:
    calls = -1
    with attached(base.unet, edits) as receipt:
        for _, latents in denoise(base, base.encode(prompts), uncond, settings, base.noise(seeds)):
            calls += 1
    receipt.verify(calls)
    if not latents.isfinite().all():
        raise ResourceError(
            "the latents are not finite", "try --dtype fp32, fewer erasures or less --guidance"
        )
    return latents, receipt


def _fired(receipt: Receipt, row: int, n: int) -> frozenset[str]:
    """Edits open for picture `row` of `n`: its rows are `row` and, with guidance, `n + row`."""
    rows = (row, n + row)
    tallies = receipt.by_name.items()
    return frozenset(name for name, tally in tallies if any(tally.opened[r] for r in rows))


def draw(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    edits: Sequence[Edit] = (),
) -> Tensor:
    """All pictures at once: uint8 [n, h, w, 3] on the CPU."""
    return torch.stack([d.picture for d in drawings(base, prompts, seeds, settings, edits)])
