"""A few pictures and a few steps of fine-tuning: how cheaply do the weights learn the concept again?

The erased model is fine-tuned with the plain objective of diffusion (Ho et al. 2020, eq. 14) on a
handful of the concept's pictures under its own captions, by low-rank changes of its attention beside
the erasure. It tells weights that forgot from weights that are only held back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from conceptzap.evaluation.probes import seed_of
from conceptzap.redteam import search
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import STRAIGHT, Victim
from conceptzap.report import Report
from conceptzap.training import objectives

PAPER = ""
PAPER_SETTINGS = {"pictures": 16}
TRIES = (20, 50, 100)  # steps after which it is tried; and after the last


@dataclass(frozen=True)
class Config:
    pictures: int = 8  # of the concept, drawn by the base; 4 to 16
    rounds: int = 10  # tried after 20, 50 and 100 steps and the last
    steps: int = 10  # of a round
    rank: int = 4
    sites: str = "unet.*.attn*.to_*"
    lr: float = 0.002
    decay: float = 0.0
    batch: int = 4


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    prompts = [victim.prompts[i % len(victim.prompts)] for i in range(cfg.pictures)]
    seeds = [seed_of(f"relearn-{victim.seed}", prompt, i) for i, prompt in enumerate(prompts)]
    clean, cond = victim.pictured(prompts, seeds, report), victim.base.encode(prompts)
    edits = objectives.low_rank(victim.base, cfg.sites, cfg.rank, victim.seed, role="attack")
    start = objectives.parameters(edits)

    def loss(v: dict, generator: torch.Generator, step: int) -> torch.Tensor:
        rows = torch.randint(len(clean), (cfg.batch,), generator=generator)
        t = search.times(victim, len(rows), generator).to(clean.device)
        x, noise = victim.noised(clean[rows], t, generator)
        seen = victim.eps(STRAIGHT, x, t, cond[rows], taught(edits, v))
        return (seen - noise).pow(2).mean()

    about = ["relearn", cfg.pictures, cfg.rank, cfg.sites, cfg.batch]
    rounds = search.search(victim, STRAIGHT, about, start, loss, search.Pace.of(cfg), report)
    due = [-(-steps // cfg.steps) for steps in TRIES]  # the rounds at which so many are over
    for number, found in enumerate(rounds, 1):
        if number in due or number == cfg.rounds:
            yield Attempt("", f"{number * cfg.steps} steps", edits=tuple(taught(edits, found)), found=found)


def taught(edits: list, tensors: dict) -> list:
    """The edits with other tensors, named `index.slot`."""
    return [
        replace(edit, tensors={slot: tensors[f"{i}.{slot}"] for slot in edit.tensors})
        for i, edit in enumerate(edits)
    ]
