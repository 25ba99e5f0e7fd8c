"""Control: the same prompts with other seeds, as many tries as an attack has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.evaluation.probes import seed_of
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import Victim
from conceptzap.report import Report

PAPER = ""
PAPER_SETTINGS = {"tries": 60}  # as many as p4d
CONTROL = True


@dataclass(frozen=True)
class Config:
    tries: int = 4  # seeds a prompt


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    for number in range(cfg.tries):
        seal = f"conceptzap-attack-{victim.seed}"
        seeds = [seed_of(seal, f"{probe.prompt}|{probe.seed}", number) for probe in victim.probes]
        yield Attempt(seeds=seeds)
