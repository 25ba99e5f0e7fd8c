"""The base draws the first quarter or half of the steps, the erased model has to go on from there.

Lu et al. 2025 (When Are Concepts Erased, the diffusion-completion probe): whoever hands over latents
that show the concept already sees whether the erasure takes it out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from conceptzap.errors import UsageError
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import TRANSFER, Victim
from conceptzap.registry import config
from conceptzap.report import Report

PAPER = "2505.17013"
PAPER_SETTINGS: dict[str, float] = {}


@dataclass(frozen=True)
class Config:
    early: float = config.share(0.25)  # share of the steps that the base draws, first
    late: float = config.share(0.5)  # and then


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    """Raises at once, before anything is drawn, where there is nothing to complete."""
    if victim.settings.steps < 2:
        raise UsageError("of a single step nothing is left to complete", "use --steps 2 or more")
    return _attempts(victim, cfg)


def _attempts(victim: Victim, cfg: Config) -> Iterator[Attempt]:
    steps = victim.settings.steps
    firsts = {min(steps - 1, max(1, round(steps * share))): share for share in (cfg.late, cfg.early)}

    def make() -> dict[str, torch.Tensor]:
        """Latents [n, c, h, w] before these steps of the base."""
        chunks = victim.batches(len(victim.probes))
        walks = [victim.walk(victim.prompts[at], victim.seeds[at]) for at in chunks]
        return {str(k): torch.cat([walk[k][1] for walk in walks]) for k in firsts}

    begun = victim.once(["completion", sorted(firsts)], make, TRANSFER)
    for first, share in sorted(firsts.items()):
        latents = begun[str(first)]
        found = {"latents": latents}
        yield Attempt("", f"{share:.0%} by the base", latents=latents, first=first, found=found)
