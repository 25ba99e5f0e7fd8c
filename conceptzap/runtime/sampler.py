"""The one denoising loop, as a generator: DDIM without noise (Song et al. 2021, eq. 12) by default.

Every step is made in what the checkpoint itself predicts, by diffusers' own scheduler: noise cannot
be stepped with where there is no signal, at the first step of a schedule that ends in pure noise.
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
from conceptzap.errors import ResourceError, UsageError
from conceptzap.report import Report
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
) -> Iterator[tuple[float, Tensor]]:
    """Yield (t, latents [n, c, h, w]) before every UNet call and (-1, latents) at the end.

    `cond` has n rows, `uncond` one or n; with guidance up to 1 the unconditional half is left out.
    """
    scheduler = base.scheduler(settings.scheduler)
    scheduler.set_timesteps(settings.steps)
    n, guided = len(noise), settings.guidance > 1
    both = Cond.cat([uncond if len(uncond) == n else uncond[[0] * n], cond]) if guided else cond
    latents = noise * scheduler.init_noise_sigma  # [n, c, h, w]
    for t in scheduler.timesteps:
        yield t.item(), latents
        x = scheduler.scale_model_input(latents, t)
        output = base.predict(x.repeat(2, 1, 1, 1) if guided else x, t, both)
        if guided:
            without, given = output.chunk(2)
            output = without + settings.guidance * (given - without)
        latents = scheduler.step(output, t, latents).prev_sample
    yield -1, latents


def size_of(base: Base, settings: Settings) -> tuple[int, int]:
    """Height and width of the pictures, in pixels: as asked, else the base's own."""
    height, width = base.size
    size = (settings.height or height, settings.width or width)
    if any(side % base.factor for side in size):
        hint = f"{base.id} draws multiples of {base.factor}"
        raise UsageError(f"pictures of {size[0]} x {size[1]} px cannot be drawn", hint)
    return size


def drawings(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    edits: Sequence[Edit] = (),
    report: Report | None = None,
) -> Iterator[Drawing]:
    """Draw prompt i with seed i, `settings.batch` pictures a UNet call, under the edits.

    `report` counts the steps.

    The receipt of every batch is verified before its latents are decoded: raises `SilentEditError`
    and makes no picture where an edit did not run, `ResourceError` where the latents diverged.
    """
    size = size_of(base, settings)
    uncond = base.unconditional(settings.negative, size)
    for start in range(0, len(prompts), settings.batch):
        chunk = slice(start, start + settings.batch)
        latents, receipt = _batch(base, prompts[chunk], seeds[chunk], settings, edits, uncond, report)
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
    report: Report | None,
) -> tuple[Tensor, Receipt]:
    calls, size = -1, size_of(base, settings)
    with attached(base.unet, edits) as receipt:
        cond, noise = base.encode(prompts, size=size), base.noise(seeds, size)
        walk = denoise(base, cond, uncond, settings, noise)
        for _, latents in report.count(walk, settings.steps + 1, "step") if report else walk:
            calls += 1
    receipt.verify(calls)
    if not latents.isfinite().all():
        raise ResourceError(
            "the latents are not finite", "try --dtype float32, fewer erasures or less --guidance"
        )
    return latents, receipt


def _fired(receipt: Receipt, row: int, n: int) -> frozenset[str]:
    """Edits open for picture `row` of `n`: its rows are `row` and, with guidance, `n + row`."""
    return receipt.fired((row, n + row))


def draw(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    edits: Sequence[Edit] = (),
) -> Tensor:
    """All pictures at once: uint8 [n, h, w, 3] on the CPU."""
    return torch.stack([d.picture for d in drawings(base, prompts, seeds, settings, edits)])
