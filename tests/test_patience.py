"""A training ends when checks bring nothing more, at the same step whether it was stopped or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from conceptzap.edit import Edit
from conceptzap.testing import tiny
from conceptzap.training.patience import Patience, Way
from conceptzap.training.session import Session
from conceptzap.training.train import Event, Group, train
from conceptzap.training.wordings import Pair

STEPS = 40
GONE = [0.0, 0.3, 0.6, 0.8, 0.9, 0.905, 0.907, 0.908, *[0.909] * 20]


@pytest.mark.parametrize(
    ("patience", "found", "over"),
    [
        (2, GONE[:6], False), (2, GONE[:7], True), (3, GONE[:7], False), (3, GONE[:8], True),
        (2, [0.4, 0.4, 0.4, 0.4], False),  # nothing is gone yet
        (2, [0.9, 0.9], False), (1, [0.9, 0.9], True), (2, [0.9, 0.9, 0.8], False),
    ],
)  # fmt: skip
def test_it_ends_when_checks_in_a_row_bring_nothing_more(
    patience: int, found: list[float], over: bool
) -> None:
    checks = Patience(patience, lambda: 0.0)
    checks.found = found
    assert checks.over is over


def test_it_is_asked_twenty_times() -> None:
    checks = Patience(2, lambda: 0.0)
    for step in range(1, 101):
        checks.look(step, 100)
    assert len(checks.found) == 20


class Toy:
    """A parameter that a training moves by one each step, and the checks that look at it."""

    def __init__(self, folder: Path) -> None:
        self.value = nn.Parameter(torch.zeros(()))
        patience = Patience(2, lambda: GONE[round(self.value.item()) // 2 - 1])
        self.session = Session(folder, {}, every_seconds=0, patience=patience)

    def losses(self, step: int, part: int, parts: int) -> Iterator[tuple[str, torch.Tensor, str]]:
        yield "down", -self.value, "only"

    def events(self) -> Iterator[Event]:
        return train({"only": Group({"v": self.value}, lr=1.0)}, self.losses, steps=STEPS, session=self.session)


def test_a_training_ends_early(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    assert [event.step for event in toy.events()][-1] == 14 and toy.value.item() == pytest.approx(14, abs=1e-3)
    assert not list(toy.events())  # taken up, it stays where it ended


@pytest.mark.parametrize("stop", range(1, 14))
def test_stopped_and_taken_up_it_ends_at_the_same_step(tmp_path: Path, stop: int) -> None:
    first = Toy(tmp_path).events()
    while next(first).step < stop:
        pass
    first.close()
    toy = Toy(tmp_path)
    assert [event.step for event in toy.events()] == list(range(stop + 1, 15))
    assert len(toy.session.patience.found) == 7


def test_the_way_to_the_anchor() -> None:
    """Edits that swap the concept's states for the anchor's go all of the way, those that do nothing none."""
    base = tiny("sd1")
    way = Way(base, [Pair("a cat", "a dog")])
    sites = tuple(base.sites("unet.*.attn2"))
    nothing = Edit("tokens", sites, {f"prompt_{letter}": torch.zeros(1, 32) for letter in "kv"}, scale=0.0)
    assert way.gone([nothing]) == 0
    states = base.encode(["a dog"]).states[0].float()  # [77, d]
    swap = Edit("tokens", sites, {f"prompt_{letter}": states for letter in "kv"}, params={"alone": True})
    assert way.gone([swap]) == pytest.approx(1, abs=0.05)


def test_a_change_of_the_text_encoder_is_looked_at_too() -> None:
    base = tiny("sd1")
    (site, *_) = base.sites("text.1.*.q_proj")
    width = base.text_encoders[0].config.hidden_size
    tensors = {"up": torch.ones(width, 1), "down": torch.ones(1, width)}
    assert Way(base, [Pair("a cat", "a dog")]).gone([Edit("weight", (site,), tensors)]) != 0
