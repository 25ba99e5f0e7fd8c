"""Control: random tokens in front of the same prompts, as many tries as an attack has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.redteam import discrete
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.carrier import allowed
from conceptzap.redteam.victim import Victim
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier

PAPER = ""
PAPER_SETTINGS = {"tries": 60}  # as many as p4d
CONTROL = True


@dataclass(frozen=True)
class Config:
    tries: int = 4  # draws of the tokens
    tokens: int = config.tokens(5)  # in front of the prompt


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    carrier = Carrier.before(victim.base, victim.prompts, cfg.tokens)
    usable = allowed(victim.base, ())
    for number in range(cfg.tries):
        ids = discrete.begin(victim, len(carrier), cfg.tokens, usable, number)
        yield Attempt(prompts=carrier.texts(ids), cond=carrier.written(ids))
