"""What modules of the UNet give while the base draws: for steering vectors and sparse dictionaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.runtime import adapters
from conceptzap.training import memory
from conceptzap.training.objectives import CHUNK, Trajectories


def matching(base: Base, pattern: str) -> tuple[str, ...]:
    """The sites of a pattern; raises `UsageError` where there are none."""
    if not (sites := base.sites(pattern)):
        raise UsageError(f"no module of this base matches {pattern!r}", "for example: unet.*.attn2")
    return sites


def places(x: Tensor) -> Tensor:
    """Features of pictures [rows, d, h, w] or of rows [rows, places, d] as [rows, places, d]."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


@contextmanager
def outputs(base: Base, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Site -> what it gave in the last UNet call of the block, [rows, places, d]."""
    found: dict[str, Tensor] = {}

    def hook(site: str):
        return lambda module, args, output: found.__setitem__(site, places(adapters.made(site, output)))

    handles = [base.module(site).register_forward_hook(hook(site)) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def along(
    base: Base, drawn: Trajectories, sites: Sequence[str], report: Report
) -> Iterator[dict[str, Tensor]]:
    """At every step of trajectories: site -> features [n, places, d] for their own prompts, on the CPU."""
    n, rows = drawn.latents.shape[1], memory.rows_that_fit(base, CHUNK)
    times = drawn.times.tolist()
    for step, t in report.count(enumerate(times), len(times), "reading activations"):

        def read(chunk: slice, step: int = step, t: int = t) -> dict[str, Tensor]:
            with outputs(base, sites) as found:
                base.eps(drawn.latents[step, chunk].to(base.device), int(t), drawn.concept[chunk])
                return {site: x.float().cpu() for site, x in found.items()}

        parts = list(memory.in_chunks(n, rows, read))
        yield {site: torch.cat([part[site] for part in parts]) for site in sites}
