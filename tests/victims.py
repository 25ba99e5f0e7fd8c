"""What tests of attacks attack, and with how little."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import edits as some
import numpy as np
import stub_judges  # noqa: F401  (named on the command line)

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.evaluation import probes
from conceptzap.evaluation.comparison import Prediction
from conceptzap.evaluation.probes import Subject, World
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import Victim
from conceptzap.registry import config, family
from conceptzap.report import Report
from conceptzap.result import Settings

SMALL = {
    "rounds": 2, "steps": 1, "pictures": 2, "batch": 2, "tries": 2, "tokens": 2, "tokens_object": 2,
    "population": 4, "generations": 2, "candidates": 2, "best": 4, "most": 2,
}  # fmt: skip
WORLD = World(
    tuple(Subject(name, "object", words) for name, words in
          {"church": ("church", "castle"), "cat": ("cat",), "dog": ("dog",), "tree": ("tree",)}.items()),
    {"": (("a photo of {a}", "a picture of {a}"), ("a drawing of {a}",))},
)  # fmt: skip
GRADIENT = ("unlearndiffatk", "p4d")


class Never:
    """A judge that sees the concept in no picture, or (`always`) in every one."""

    name, digest, kinds = "never", "0", {"object": ("church",)}

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def predict(self, pictures: np.ndarray) -> Prediction:
        n, label = len(pictures), "church" if self.always else "cat"
        nothing = np.zeros((n, 0), np.float32)
        return Prediction({"object": [(label,)] * n}, {"object": [(1.0,)] * n}, np.ones(n, bool), nothing)


@cache
def made(base: Base) -> tuple[Edit, ...]:
    """What is attacked where no test says what."""
    return some.erasure(base).edits


def victim(base: Base, edits: tuple[Edit, ...] | None = None, n: int = 2) -> Victim:
    subject = WORLD.find("church")
    suite = probes.Suite("s", "", (), {"seen": n - 1, "held-out": 1}, {})
    asked = probes.expand(suite, WORLD, [subject])
    edits = made(base) if edits is None else edits
    look = Settings(steps=2, guidance=3.0, batch=4)
    return Victim.of(base, edits, subject, world=WORLD, probes=asked, settings=look, seed=0)


def small(name: str) -> tuple[Any, Any]:
    """An attack and settings of it that a test can afford."""
    member = family.load("attacks", name)
    fields = {field.name for field in dataclasses.fields(member.Config)}
    return member, config.resolve(member.Config, {k: v for k, v in SMALL.items() if k in fields})


def attempts(on: Victim, name: str) -> list[Attempt]:
    member, cfg = small(name)
    return list(member.attack(on, cfg, Report()))
