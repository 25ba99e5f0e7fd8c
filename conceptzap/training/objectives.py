"""What trained methods share: partially sampled latents, targets, loss spaces, low-rank sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.result import Settings
from conceptzap.runtime.sampler import denoise
from conceptzap.training.wordings import Pair

T = TypeVar("T")
SPACES = ("noise", "x0")
PLACEMENTS = {
    "mid": ("unet.mid_block.*",),
    "midout": ("unet.mid_block.*", "unet.up_blocks.*"),
    "inmidout": ("unet.*",),
}
CHUNK = 24


@dataclass(frozen=True)
class Batch:
    """x_t [n, c, h, w], t [n], and what each row is conditioned on with and without the concept."""

    x: Tensor
    t: Tensor
    concept: Cond
    anchor: Cond


@dataclass(frozen=True)
class Asked:
    """Prompt pairs with the base's own latents on the way from noise to the concept's picture.

    `latents` [steps, n, c, h, w] at `times` [steps]; row i belongs to pair i.
    """

    latents: Tensor
    times: Tensor
    concept: Cond
    anchor: Cond

    @staticmethod
    def of(base: Base, pairs: Sequence[Pair], n: int, seed: int) -> Asked:
        """n trajectories over the pairs, in a seeded order, as evenly as n allows."""
        order = subset(seed, pairs, len(pairs))
        chosen = [order[i % len(order)] for i in range(n)]
        asked, instead = [pair.concept for pair in chosen], [pair.anchor for pair in chosen]
        latents, times = partial_sampling(base, asked, seed)
        return Asked(latents, times, base.encode(asked), base.encode(instead))

    @staticmethod
    def kept(base: Base, prompts: Sequence[str], n: int, seed: int) -> Asked:
        """The same for prompts that stay what they are."""
        return Asked.of(base, [Pair(prompt, prompt) for prompt in prompts], n, seed)

    def draw(self, generator: torch.Generator, batch: int, part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` of a batch, uniform over timesteps and trajectories."""
        steps, n = self.latents.shape[:2]
        when = torch.randint(steps, (batch,), generator=generator)
        which = torch.randint(n, (batch,), generator=generator)
        rows = slice(batch * part // parts, batch * (part + 1) // parts)
        index = which[rows].tolist()
        x = self.latents[when[rows], which[rows]]
        return Batch(x, self.times[when[rows]], self.concept[index], self.anchor[index])


@torch.no_grad()
def partial_sampling(
    base: Base, prompts: Sequence[str], seed: int, steps: int = 20, guidance: float = 3.0
) -> tuple[Tensor, Tensor]:
    """The base's own trajectories for the prompts, one each, every latent kept (ESD's x_t, cached)."""
    settings = Settings(steps=steps, guidance=guidance)
    uncond, parts, times = base.encode([""]), [], []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        noise = base.noise(range(seed + start, seed + start + len(chunk)))
        states = list(denoise(base, base.encode(chunk), uncond, settings, noise))[:-1]
        times = [t for t, _ in states]
        parts.append(torch.stack([latents for _, latents in states]))
    return torch.cat(parts, 1), torch.tensor(times)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one training step; drawing all from it makes a run resumable without state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def distance(base: Base, eps: Tensor, target: Tensor, t: Tensor, space: str) -> Tensor:
    """Mean squared error per row in noise space, or in the x0 space of the EAP and KPOP code.

    x0 = (x_t - sqrt(1 - a) eps) / sqrt(a), so that space weighs a step by (1 - a) / a: about 200 at
    t = 1000 and .01 at t = 20.
    """
    if space not in SPACES:
        raise UsageError(f"unknown loss space {space!r}", f"use {' or '.join(SPACES)}")
    error = (eps - target).pow(2).flatten(1).mean(1)
    if space == "x0":
        alpha = base.alphas[t.to(base.alphas.device)].to(error)
        error = error * (1 - alpha) / alpha
    return error.mean()


def negative_guidance(eps_concept: Tensor, eps_anchor: Tensor, eta: float) -> Tensor:
    """eps_a - eta (eps_c - eps_a), away from the concept: ESD, eq. 5, a for the empty prompt."""
    return eps_anchor - eta * (eps_concept - eps_anchor)


def placed(base: Base, placement: str) -> tuple[str, ...]:
    """Cross-attentions in the middle block, also behind it, or everywhere (KPOP's `mode`)."""
    if placement not in PLACEMENTS:
        raise UsageError(f"unknown placement {placement!r}", f"use {', '.join(PLACEMENTS)}")
    return tuple(s for pattern in PLACEMENTS[placement] for s in base.sites(f"{pattern}.attn2"))


def prompt(
    base: Base, text: str, size: int, placement: str, seed: int, **rest: Any
) -> Edit:
    """A trainable pair of K and V prompts in context space, begun as the states of a text.

    `size` tokens [size, width] each, or as many as the states after the text's start token allow;
    `rest` are the edit's gates and role.
    """
    start = base.encode([text]).states[0, 1 : 1 + size].float().cpu()
    noise = torch.randn(2, *start.shape, generator=torch.Generator().manual_seed(seed))
    rows = start + 0.02 * start.std() * noise
    slots = {f"prompt_{letter}": parameter(rows[i], base) for i, letter in enumerate("kv")}
    return Edit("tokens", placed(base, placement), slots, **rest)


def low_rank(base: Base, pattern: str, rank: int, seed: int, role: str = "erase") -> list[Edit]:
    """A trainable `up down` edit at every matching Linear; up starts at zero: no change yet."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for site in base.sites(pattern):
        weight = getattr(base.module(site), "weight", None)
        if weight is None or weight.ndim != 2:
            continue
        out, width = weight.shape
        r = min(rank, out, width)
        down = torch.randn(r, width, generator=generator) / width**0.5
        edits.append(
            Edit(
                "weight",
                (site,),
                {"up": parameter(torch.zeros(out, r), base), "down": parameter(down, base)},
                role=role,
            )
        )
    if not edits:
        raise UsageError(
            f"no Linear of this base matches {pattern!r}", "for example: unet.*.attn2.to_*"
        )
    return edits


def parameter(tensor: Tensor, base: Base) -> nn.Parameter:
    return nn.Parameter(tensor.to(base.device, torch.float32))


def parameters(edits: Sequence[Edit]) -> dict[str, nn.Parameter]:
    """Trainable tensors by edit index and slot."""
    return {f"{i}.{slot}": t for i, edit in enumerate(edits) for slot, t in edit.tensors.items()}


def subset(seed: int, items: Sequence[T], n: int) -> list[T]:
    """n items in a seeded random order, without repeats."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[index] for index in order[:n]]
