"""The gate that reads the text: it separates what can be separated, and tells its error rates."""

from __future__ import annotations

from functools import cache

import torch
from small import lesson

from conceptzap.base import Base
from conceptzap.edit import Edit, Gate
from conceptzap.report import Report
from conceptzap.runtime import gates
from conceptzap.runtime.gates import Signal
from conceptzap.task import Task
from conceptzap.training import detector, lessons
from conceptzap.training.lessons import Lesson
from conceptzap.training.states import States
from conceptzap.training.wordings import Pair

WIDTH, LENGTH = 8, 6


def toy(prompts: list[str], parts: tuple[int, ...] = (WIDTH,)) -> States:
    """States of "yes" and "no" prompts, the last two positions padding.

    In "yes 3" position 3 % 4 points along the first axis of each encoder, and the padding with it;
    in "first 3" only the first encoder's states do, in "also 3" they point along the third axis, in
    "between 3" a little along both.
    """
    return States(
        index={prompt: number for number, prompt in enumerate(prompts)},
        hidden=torch.stack([_states(prompt, parts) for prompt in prompts]).half(),
        ids=torch.zeros(len(prompts), LENGTH, dtype=torch.long),
        ends=torch.full((len(prompts),), LENGTH - 3),
        pooled=None,
        parts=parts,
    )


def _states(prompt: str, parts: tuple[int, ...]) -> torch.Tensor:
    word, number = prompt.split()
    generator = torch.Generator().manual_seed(int(number))
    halves = []
    for place, width in enumerate(parts):
        states = 0.05 * torch.randn(LENGTH, width, generator=generator)
        states[:, 1] += 1
        if word == "yes" or (word == "first" and place == 0):
            states[[int(number) % (LENGTH - 2), -2, -1], 0] += torch.tensor([1.0, 3.0, 3.0])
        if word == "also":
            states[[int(number) % (LENGTH - 2), -2, -1], 2] += torch.tensor([1.0, 3.0, 3.0])
        if word == "between":
            states[int(number) % (LENGTH - 2), [0, 2]] += 0.25
        halves.append(states)
    return torch.cat(halves, -1)


def asked(word: str, n: int = 40, start: int = 0) -> list[str]:
    return [f"{word} {number}" for number in range(start, start + n)]


@cache
def fit(seed: int = 0, yes: int = 40, no: int = 40, parts: tuple[int, ...] = (WIDTH,)) -> Gate:
    prompts = asked("yes", yes), asked("no", no)
    return detector.fit_gate(toy([*prompts[0], *prompts[1]], parts), *prompts, seed=seed)


def opened(gate: Gate, states: torch.Tensor) -> torch.Tensor:
    signal = Signal(states, torch.zeros(len(states)))
    return gates.factor(Edit("weight", ("unet.x",), {}, gates=(gate,)), signal)


def states(*prompts: str, parts: tuple[int, ...] = (WIDTH,)) -> torch.Tensor:
    return toy(list(prompts), parts).hidden.float()


def test_it_separates_what_can_be_separated() -> None:
    gate = fit()
    assert opened(gate, states(*asked("yes", start=100))).all()
    assert not opened(gate, states(*asked("no", start=100))).any()
    for name in ("false_open", "false_shut"):
        rate = gate.params[name]
        assert rate["rate"] == 0 and rate["n"] == 20 and 0 == rate["low"] < rate["high"] < 0.2


def test_it_opens_for_states_without_padding() -> None:
    """The padding shows the concept most, and yet it does not take the padding to open."""
    bare = states(*asked("yes", start=100))[:, : LENGTH - 2]
    assert opened(fit(), bare).all()
    assert not opened(fit(), states(*asked("no", start=100))[:, : LENGTH - 2]).any()


def test_rows_of_zeros_shut_it() -> None:
    for parts in ((WIDTH,), (WIDTH, 6)):
        assert not opened(fit(parts=parts), torch.zeros(3, LENGTH, sum(parts))).any()


def test_a_concept_in_one_of_two_encoders_opens_it() -> None:
    parts = (WIDTH, 6)
    gate = fit(parts=parts)
    assert gate.params["parts"] == list(parts)
    first = states(*asked("first", start=100), parts=parts)
    second = torch.cat([states(*asked("no", start=200), parts=parts)[..., :WIDTH],
                        states(*asked("yes", start=200), parts=parts)[..., WIDTH:]], -1)  # fmt: skip
    for half in (first, second, states(*asked("yes", start=100), parts=parts)):
        assert opened(gate, half).all()
    assert not opened(gate, states(*asked("no", start=100), parts=parts)).any()


def test_what_cannot_be_separated_is_confessed() -> None:
    groups = asked("no"), asked("no", start=200)
    gate = detector.fit_gate(toy([*groups[0], *groups[1]]), *groups, seed=0)
    assert gate.params["false_open"]["rate"] + gate.params["false_shut"]["rate"] > 0.1


def test_wordings_that_come_in_turn_are_all_learned() -> None:
    """Every other prompt is of another kind: halves by number would learn one kind and judge the other."""
    yes = [f"{('yes', 'also')[number % 2]} {number}" for number in range(40)]
    gate = detector.fit_gate(toy([*yes, *asked("no")]), yes, asked("no"), seed=0)
    assert gate.params["false_open"]["rate"] == gate.params["false_shut"]["rate"] == 0
    assert opened(gate, states(*asked("yes", start=100), *asked("also", start=100))).all()
    assert not opened(gate, states(*asked("no", start=100))).any()


def test_what_stays_close_to_the_concept_gets_a_gate_with_more_directions() -> None:
    """One direction tells them apart, and barely; what it was not fitted on would open it."""
    yes = [f"{('yes', 'also')[number % 2]} {number}" for number in range(40)]
    no = [*asked("no"), *asked("between", start=100)]
    gate = detector.fit_gate(toy([*yes, *no]), yes, no, seed=0, directions=1)
    assert gate.params["false_open"]["rate"] == 0 and len(gate.tensors["query"]) == 2
    assert opened(gate, states(*asked("yes", start=300))).all()
    assert not opened(gate, states(*asked("between", start=200))).any()


def test_a_synonym_that_is_like_what_stays_is_none_of_a_gates_own() -> None:
    """"like" is "no" in all but its name: a gate that opened for it would open for what stays."""
    pairs = tuple(Pair(prompt, "") for prompt in [*asked("yes"), *asked("like", start=300)])
    stay = asked("no", 60)
    told = Lesson("yes", "", "object", ("like",), pairs, tuple(stay))
    read = toy([*told.prompts, *stay, "no 999"])
    read.index[""] = read.index.pop("no 999")
    plain = detector.fit_gate(read, told.prompts, stay, seed=0)
    assert plain.params["false_open"]["rate"] > 0.3

    class Heard(Report):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    gate = lessons.gate(None, [told], 0, states=read, report=Heard())  # type: ignore[arg-type]
    assert gate.params["false_open"]["rate"] == 0 and "not told of like" in notes[0]
    assert opened(gate, states(*asked("yes", start=100))).all()
    assert not opened(gate, states(*asked("no", start=100))).any()


def test_the_weight_of_a_prompt_changes_nothing() -> None:
    gate, some = fit(), states(*asked("yes", 5), *asked("no", 5))
    assert torch.allclose(gates.scores(gate, some), gates.scores(gate, 1.7 * some), atol=1e-5)


def test_the_same_seed_gives_the_same_gate() -> None:
    first, again, other = (fit.__wrapped__(seed) for seed in (1, 1, 2))
    assert first.name == again.name != other.name


def test_it_is_stored_in_half_precision_and_calibrated_so() -> None:
    gate = fit()
    assert {tensor.dtype for tensor in gate.tensors.values()} == {torch.float16}
    worst = gates.scores(gate, states(*asked("yes"))[:, : LENGTH - 2]).amax(1).min()
    assert worst > gate.params["threshold"]


def test_the_error_rates_count_the_half_that_was_not_learned_from() -> None:
    gate = fit(yes=11, no=8)
    assert (gate.params["false_shut"]["n"], gate.params["false_open"]["n"]) == (5, 4)


def test_the_gate_of_a_concept_opens_without_padding_on_the_demo(demo_base: Base) -> None:
    told = [lesson(demo_base, Task(("church",), ("house",), ("castle", "tree")))]
    gate = lessons.gate(demo_base, told, seed=0, keep_prompts=100)
    for prompt in told[0].prompts[:30]:
        length = demo_base.token_count(prompt) + 2
        assert opened(gate, demo_base.encode([prompt]).states[:, :length]).all(), prompt
    for prompt in ("", "a house", "a photo of a castle", "a cat by Monet"):
        length = demo_base.token_count(prompt) + 2
        assert not opened(gate, demo_base.encode([prompt]).states[:, :length]).any(), prompt
