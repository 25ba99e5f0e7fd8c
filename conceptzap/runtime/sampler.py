"""The one denoising loop, as a generator: DDIM without noise (Song et al. 2021, eq. 12) by default.

Every step is made in what the checkpoint itself predicts, by diffusers' own scheduler: noise cannot
be stepped with where there is no signal, at the first step of a schedule that ends in pure noise.
Whoever needs latents on the way stops early by leaving the loop. Every picture has a generator of
its own; with one picture a UNet call it depends on nothing but prompt, seed and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import ResourceError, UsageError
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime.attach import Receipt, attached
from conceptzap.runtime.guides import Guidance


@dataclass(frozen=True)
class Drawing:
    """One picture, uint8 [h, w, 3] on the CPU, and which edits were ever open for it."""

    picture: Tensor
    prompt: str
    seed: int
    fired: frozenset[str]


@dataclass(frozen=True)
class Start:
    """What n pictures are drawn from where prompts and seeds do not say it.

    `cond` has n rows, or is a sequence of such, one for each step that is made. `latents` [n, c, h, w] are
    noise, or with `first` > 0 what stands before that step. Where `mask` [h, w] is 0, the picture
    stays what it is in `known` [n, c, h, w].
    """

    cond: Cond | Sequence[Cond]
    latents: Tensor
    first: int = 0
    known: Tensor | None = None
    mask: Tensor | None = None

    def rows(self, chosen: slice | Sequence[int]) -> Start:
        """The same for some of the pictures."""
        cond = self.cond[chosen] if isinstance(self.cond, Cond) else [one[chosen] for one in self.cond]
        known = None if self.known is None else self.known[chosen]
        return replace(self, cond=cond, latents=self.latents[chosen], known=known)


def denoise(
    base: Base,
    cond: Cond | Sequence[Cond],
    uncond: Cond,
    settings: Settings,
    noise: Tensor,
    first: int = 0,
) -> Iterator[tuple[float, Tensor]]:
    """Yield (t, latents [n, c, h, w]) before every UNet call and (-1, latents) at the end.

    `cond` has n rows, `uncond` one or n; with guidance up to 1 the unconditional half is left out.
    With `first` > 0 that many steps are taken as done, and `noise` as what they came to. What is
    written into the latents before the next ones are asked for is drawn on from.
    """
    scheduler = base.scheduler(settings.scheduler)
    scheduler.set_timesteps(settings.steps)
    n, guided = len(noise), settings.guidance > 1
    guidance = Guidance(lambda rows: rows // 2 if guided else 0)
    below = uncond if len(uncond) == n else uncond[[0] * n]
    each = [Cond.cat([below, c]) if guided else c for c in ([cond] if isinstance(cond, Cond) else cond)]
    latents = noise.clone() if first else noise * scheduler.init_noise_sigma  # [n, c, h, w]
    if first and hasattr(scheduler, "set_begin_index"):  # DDIM counts no steps
        scheduler.set_begin_index(first)
    for step, t in enumerate(scheduler.timesteps[first:]):
        both = each[step] if len(each) > 1 else each[0]
        yield t.item(), latents
        x = scheduler.scale_model_input(latents, t)
        with guidance.told():
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
    for start in range(0, len(prompts), settings.batch):
        chunk = slice(start, start + settings.batch)

        def begin(chunk: slice = chunk) -> Start:
            return Start(base.encode(prompts[chunk], size=size), base.noise(seeds[chunk], size))

        latents, receipt = _batch(base, begin, settings, edits, report)
        pictures = base.decode(latents)
        for row, picture in enumerate(pictures):
            fired = _fired(receipt, row, len(pictures))
            yield Drawing(picture, prompts[start + row], seeds[start + row], fired)


def drawings_from(
    base: Base, start: Start, settings: Settings, edits: Sequence[Edit] = ()
) -> Iterator[tuple[Tensor, frozenset[str]]]:
    """Draw from conditioning and latents: each picture, uint8 [h, w, 3], and which edits were open.

    Batches, receipts and errors as in `drawings`.
    """
    for at in range(0, len(start.latents), settings.batch):
        part = start.rows(slice(at, at + settings.batch))
        latents, receipt = _batch(base, lambda part=part: part, settings, edits, None)
        pictures = base.decode(latents)
        for row, picture in enumerate(pictures):
            yield picture, _fired(receipt, row, len(pictures))


@torch.no_grad()
def _batch(
    base: Base,
    begin: Callable[[], Start],
    settings: Settings,
    edits: Sequence[Edit],
    report: Report | None,
) -> tuple[Tensor, Receipt]:
    calls = -1
    with attached(base, edits) as receipt:
        start = begin()  # texts are encoded under the edits, the negative prompt, too
        uncond = base.unconditional(settings.negative, size_of(base, settings))
        walk = denoise(base, start.cond, uncond, settings, start.latents, start.first)
        total = settings.steps - start.first + 1
        for t, latents in report.count(walk, total, "step") if report else walk:
            if start.mask is not None:
                _put_back(base, start, t, latents)
            calls += 1
    receipt.verify(calls)
    if not latents.isfinite().all():
        raise ResourceError(
            "the latents are not finite", "try --dtype float32, fewer erasures or less --guidance"
        )
    return latents, receipt


def _put_back(base: Base, start: Start, t: float, latents: Tensor) -> None:
    """Write the part that is known into the latents, noised as they are at t (RePaint, Lugmayr 2022)."""
    alpha = base.alphas[int(t)].to(latents) if t >= 0 else latents.new_ones(())
    known = alpha.sqrt() * start.known + (1 - alpha).sqrt() * start.latents  # [n, c, h, w]
    latents.copy_(torch.where(start.mask.to(latents) == 0, known, latents))


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
