"""The base as a judge of pictures: which of two texts explains what was drawn better.

Li et al. 2023 (arXiv 2303.16203): a text c is the likelier for a picture x_0 the smaller
E || eps(x_t, t, c) - noise ||^2 is. Both texts are asked on the same noise, so that few samples tell
them apart; the errors of each timestep are compared by their ratio, since those of early ones are smaller.
Nothing but the checkpoint itself is needed, and what it takes for the concept is what it can draw of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.training import memory

TIMES = (200, 400, 600)  # of 1000
NOISES = 3  # at each


@torch.no_grad()
def rather(base: Base, clean: Tensor, concept: Cond, anchor: Cond, seed: int) -> Tensor:
    """How much better row i of `concept` explains picture i, latents [n, c, h, w], than `anchor` does: [n].

    Above 0 the picture is the concept. The base is asked as it is, so attach nothing to it.
    """

    def look(chunk: slice) -> Tensor:
        return _compared(base, clean[chunk], concept[chunk], anchor[chunk], seed + chunk.start)

    return torch.cat(list(memory.in_chunks(len(clean), memory.rows_that_fit(base, 32), look)))


def _compared(base: Base, clean: Tensor, concept: Cond, anchor: Cond, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clean, found = clean.to(base.device), []
    for number in range(len(TIMES) * NOISES):
        t = TIMES[number % len(TIMES)] * len(base.alphas) // 1000
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        alpha = base.alphas[t].to(clean)
        x = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise  # [n, c, h, w]
        times = torch.full((len(clean),), t, device=clean.device)
        errors = [
            (base.eps(x, times, cond) - noise).pow(2).flatten(1).mean(1) for cond in (concept, anchor)
        ]  # [n] each
        found.append((errors[1] - errors[0]) / (errors[1] + errors[0]))
    return torch.stack(found).mean(0).cpu()
