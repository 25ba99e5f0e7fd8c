"""Zap: behind a shut gate the picture is the base's bit for bit; the gate tells its error rates."""

from __future__ import annotations

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.gates import Signal, factor

LOOK = Settings(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def made(sd1: Base) -> list[Edit]:
    return edits(sd1, "zap")


def test_both_edits_stand_behind_one_gate(made: list[Edit]) -> None:
    assert sorted(edit.op for edit in made) == ["tokens", "weight"]
    assert len({gate.name for edit in made for gate in edit.gates}) == 1


def test_the_gate_tells_both_error_rates(made: list[Edit]) -> None:
    (gate,) = made[0].gates
    assert set(gate.params) == {"threshold", "false_open", "false_shut"}
    for name in ("false_open", "false_shut"):
        assert set(gate.params[name]) == {"rate", "low", "high", "n"} and gate.params[name]["n"] > 0


def test_a_shut_gate_leaves_every_bit(sd1: Base, made: list[Edit]) -> None:
    asked = ["", "a church", "a castle by monet", "a red car", "a cat"]
    signal = Signal(sd1.encode(asked).states, torch.zeros(len(asked)))
    opened = factor(made[0], signal).bool().tolist()
    assert opened[-1] and not opened[0] and opened.count(False) >= 2
    for prompt, open_ in zip(asked, opened, strict=True):
        bare, erased = (sampler.draw(sd1, [prompt], [5], LOOK, e) for e in ((), made))
        assert torch.equal(bare, erased) is not open_


def test_without_a_gate_everything_is_touched(sd1: Base) -> None:
    ungated = edits(sd1, "zap", gate=False, steps=1, rank=0)
    assert [edit.op for edit in ungated] == ["tokens"] and ungated[0].gates == ()
