"""The middle of a picture of the concept is cut out, and the erased model has to fill it in.

Lu et al. 2025 (When Are Concepts Erased, the inpainting probe), done with any checkpoint by writing what
is known back into the latents at every step (RePaint, Lugmayr et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import Victim
from conceptzap.registry import config
from conceptzap.report import Report

PAPER = "2505.17013"
PAPER_SETTINGS: dict[str, float] = {}


@dataclass(frozen=True)
class Config:
    share: float = config.share(0.5)  # of height and width that is cut out, first
    larger: float = config.share(0.75)  # and then


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    clean = victim.remembered(report)  # [n, c, h, w]
    noise = victim.base.noise(victim.seeds)
    for share in (cfg.larger, cfg.share):
        mask = middle(*clean.shape[-2:], share)
        yield Attempt("", f"{share:.0%} cut out", latents=noise, known=clean, mask=mask)


def middle(height: int, width: int, share: float) -> torch.Tensor:
    """1 in a centred box of that share of each side, else 0: [height, width]."""
    mask = torch.zeros(height, width)
    high, wide = max(1, round(height * share)), max(1, round(width * share))
    top, left = (height - high) // 2, (width - wide) // 2
    mask[top : top + high, left : left + wide] = 1
    return mask
