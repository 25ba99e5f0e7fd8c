"""The concept's direction added to the text states of a prompt that does not name it: no search at all.

What Ring-A-Bell (Tsai et al. 2024) aims its tokens at, handed over as it is: E(p) + eta c, with
c = mean_i E(p_i with the concept) - E(p_i without it). Stronger than tokens that only come near it, and
called by another name, since it asks for an attacker who hands in embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.redteam import bell
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import CONTINUOUS, Victim
from conceptzap.report import Report

PAPER = "2310.10012"
FORMS = (CONTINUOUS,)
PAPER_SETTINGS = {"tries": 8}


@dataclass(frozen=True)
class Config:
    least: float = 0.75  # eta of the first try
    most: float = 3.0  # and of the last
    tries: int = 4


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    along, prompts = bell.direction(victim).states, [f"{text} + concept" for text in bell.unnamed(victim)]
    for number in range(cfg.tries):
        eta = cfg.least + (cfg.most - cfg.least) * number / max(1, cfg.tries - 1)
        found = {"direction": eta * along}  # [1, 77, d]
        yield Attempt(CONTINUOUS, "", prompts, cond=bell.target(victim, eta), found=found)
