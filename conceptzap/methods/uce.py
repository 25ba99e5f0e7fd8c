"""UCE: a closed-form edit of all cross-attention keys and values, in seconds.

Gandikota et al. 2024 move the state of a prompt's last subject token; here every token state from
the concept on is moved, for the concept leaks into the words and the padding behind it. The targets
are states of the anchor's prompts, so one low-rank pair serves all layers (eq. 7 with v* = W c*).
The UNet is never run. With `gate` it acts on prompts of the concept alone, all others are the base's bit for
bit: what a stack of many needs, for what each of them costs the others adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import closed_form, lessons
from conceptzap.training.solving import Unsolved, solved

PAPER = "2308.14761"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    rank: int = 8  # of the change of the text states, at most
    ridge: float = 0.05  # lambda of eq. 7, for a mean over states, of their mean square
    keep_scale: float = 4.0  # weight of the keep set, eq. 7's s_p
    keep_prompts: int = 400  # prompts of the keep set
    gate: bool = False  # True: a gate on the text, for each concept its own


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    yield from solved([unsolved(base, task, cfg, report)])[0]


def unsolved(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Unsolved]:
    rest = {"rank": cfg.rank, "ridge": cfg.ridge, "keep_scale": cfg.keep_scale}
    whole: list[closed_form.Moves] = []
    for lesson in lessons.lessons(base, task, report):
        states = lessons.read(base, lesson, cfg.keep_prompts, report, cfg.gate)
        found = lessons.moves(base, lesson, states, cfg.keep_prompts)
        if cfg.gate:
            gate = lessons.gate(base, [lesson], report.seed, cfg.keep_prompts, states=states, report=report)
            yield closed_form.unsolved(base, found, **rest, gates=(gate,))
            continue
        for total, more in zip(whole, found, strict=False):
            total.add(more)
        whole = whole or found
    if whole:
        yield closed_form.unsolved(base, whole, **rest)
