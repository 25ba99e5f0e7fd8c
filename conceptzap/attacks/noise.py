"""Noise that holds a picture of the concept: the base's run backwards, then drawn anew.

M-ErasureBench (inverted latents): x_T from DDIM inversion of a picture of the concept under the empty
prompt (Song et al. 2021), on the base (`transfer`) and on the erased model, drawn with the concept's
own prompt. Differs: also without guidance, which is how it was inverted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.redteam import inverting
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import Victim
from conceptzap.report import Report

PAPER = "2512.22877"
FORMS = inverting.FORMS
PAPER_SETTINGS: dict[str, float] = {}


@dataclass(frozen=True)
class Config:
    pass


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    clean = victim.remembered(report)  # [n, c, h, w]
    for form in victim.forms(FORMS):
        on = victim.on(form)
        latents = inverting.start(on, form, clean, on.base.encode([""]).repeat(len(clean)))
        found = {"latents": latents}
        yield Attempt(form, "guided", latents=latents, found=found)
        yield Attempt(form, "unguided", latents=latents, guidance=1.0, found=found)
