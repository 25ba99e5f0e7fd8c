"""The gate that reads the text: it separates what can be separated, and tells its error rates."""

from __future__ import annotations

import pytest
import torch

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.runtime import gates
from conceptzap.runtime.gates import Signal
from conceptzap.training import detector

WIDTH, LENGTH = 8, 6


class Toy:
    """An encoder of "yes" and "no" prompts; in "yes 3" position 3 points along the first axis."""

    def encode(self, prompts: list[str]) -> Cond:
        return Cond(torch.stack([self._states(prompt) for prompt in prompts]))

    def _states(self, prompt: str) -> torch.Tensor:
        word, number = prompt.split()
        generator = torch.Generator().manual_seed(int(number))
        states = 0.05 * torch.randn(LENGTH, WIDTH, generator=generator)
        states[:, 1] += 1
        if word == "yes":
            states[int(number) % LENGTH, 0] += 2
        return states


def asked(word: str, n: int = 40, start: int = 0) -> list[str]:
    return [f"{word} {number}" for number in range(start, start + n)]


def opened(gate, prompts: list[str]) -> torch.Tensor:
    signal = Signal(Toy().encode(prompts).states, torch.zeros(len(prompts)))
    return gates.factor(Edit("weight", ("unet.x",), {}, gates=(gate,)), signal)


def test_it_separates_what_can_be_separated() -> None:
    gate = detector.fit_gate(Toy(), asked("yes"), asked("no"), seed=0)
    assert opened(gate, asked("yes", start=100)).all()
    assert not opened(gate, asked("no", start=100)).any()
    for name in ("false_open", "false_shut"):
        rate = gate.params[name]
        assert rate["rate"] == 0 and rate["n"] == 20 and 0 == rate["low"] < rate["high"] < 0.2


def test_what_cannot_be_separated_is_confessed() -> None:
    gate = detector.fit_gate(Toy(), asked("no"), asked("no", start=200), seed=0)
    assert gate.params["false_open"]["rate"] + gate.params["false_shut"]["rate"] > 0.1


def test_the_weight_of_a_prompt_changes_nothing() -> None:
    gate = detector.fit_gate(Toy(), asked("yes"), asked("no"), seed=0)
    states = Toy().encode(asked("yes", 5) + asked("no", 5)).states
    assert torch.allclose(gates.scores(gate, states), gates.scores(gate, 1.7 * states), atol=1e-5)


def test_the_same_seed_gives_the_same_gate() -> None:
    first, again, other = (
        detector.fit_gate(Toy(), asked("yes"), asked("no"), s) for s in (1, 1, 2)
    )
    assert first.name == again.name != other.name


def test_the_error_rates_count_the_half_that_was_not_learned_from() -> None:
    gate = detector.fit_gate(Toy(), asked("yes", 11), asked("no", 8), seed=0)
    assert (gate.params["false_shut"]["n"], gate.params["false_open"]["n"]) == (5, 4)


def test_neighbours_come_nearest_first_without_the_word_itself(sd1: Base) -> None:
    words = ["dog", "Cat", "cat", "horse", "dog", "church"]
    near = detector.neighbours(sd1, "cat", words)
    assert sorted(word for word, _ in near) == ["church", "dog", "horse"]
    cosines = [cosine for _, cosine in near]
    assert cosines == sorted(cosines, reverse=True) and all(-1.001 <= c <= 1.001 for c in cosines)


def test_states_do_not_depend_on_the_chunks(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a cat", "a dog", "", "a house by monet", "red"]
    whole = detector.states(sd1, prompts)
    monkeypatch.setattr(detector, "CHUNK", 2)
    assert torch.allclose(detector.states(sd1, prompts), whole, atol=1e-6)
