"""A text gate for a name that is written wrongly, and how hardening comes by it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import edits as some
import pytest
import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Gate
from conceptzap.errors import RefusedError
from conceptzap.redteam import hardening, slips, spelling
from conceptzap.redteam.case import Budget, Case
from conceptzap.redteam.finding import Found
from conceptzap.report import Report
from conceptzap.runtime import gates
from conceptzap.task import Task
from conceptzap.training import detector, lessons
from conceptzap.training.carrier import Carrier, ids_of, position, tables
from conceptzap.training.lessons import Lesson
from conceptzap.training.states import States
from conceptzap.trust import canary
from conceptzap.verbs import erasing

TASK = Task(("van gogh",), ("painting",), ("monet", "cat"), ("style",))
SMALL = Budget(concept=4, others=8, styled=4, erased=2, mixed=3, batch=2)
FORMS = ("{}", "a {}", "a photo of a {}", "a {} painted by Monet")


def opened(gate: Gate, base: Base, texts: list[str] | tuple[str, ...]) -> list[bool]:
    parts = [gates.margins(gate, base.encode(texts[i : i + 64]).states) > 0 for i in range(0, len(texts), 64)]
    return torch.cat(parts).tolist()


@cache
def church(base: Base) -> tuple[Lesson, Gate, Gate]:
    """What it is taught on the demo, the gate of plain prompts, and the one for wrong spelling."""
    task = lessons.settled(base, Task(("church",), ("house",)), Report())
    lesson = next(iter(lessons.lessons(base, task)))
    plain = lessons.gate(base, [lesson], 0)
    gate = slips.fit_gate(base, lesson, (), plain, 0)
    assert gate
    return lesson, plain, gate


def test_it_opens_for_wrong_spelling_and_for_the_plain_name(demo_base: Base) -> None:
    lesson, plain, gate = church(demo_base)
    asked = [form.format(word) for word in ("chrch", "chruch", "chuurch") for form in FORMS]
    assert not any(opened(plain, demo_base, asked)) and all(opened(gate, demo_base, asked))
    assert all(opened(gate, demo_base, lesson.prompts))
    assert gate.params["false_shut"]["rate"] == 0 and gate.params["false_shut"]["n"] >= 4 * 10


def test_it_stays_shut_for_what_stays_whole_or_written_wrongly(demo_base: Base) -> None:
    lesson, plain, gate = church(demo_base)
    stay = lessons.sides([lesson])[1]
    assert not any(opened(gate, demo_base, stay))
    assert gate.params["false_open"]["rate"] == 0 and gate.params["false_open"]["n"] == len(stay)
    words = [word for word in demo_base.vocabulary() if word not in lesson.names]
    held_out = [f"a {word} painted by Monet" for word in words]
    assert opened(gate, demo_base, held_out) == opened(plain, demo_base, held_out)
    wrong = [f"an oil painting of a {spelling.misspelt(word)[0]}" for word in words]
    assert sum(opened(gate, demo_base, wrong)) <= len(wrong) // 20


def test_prompts_of_what_is_erased_beside_it_count_as_what_stays(demo_base: Base) -> None:
    lesson, plain, _ = church(demo_base)
    gate = slips.fit_gate(demo_base, lesson, [form.format("chrch") for form in FORMS], plain, 0)
    assert gate and not any(opened(gate, demo_base, [form.format("chrch") for form in FORMS]))
    assert all(opened(gate, demo_base, [form.format("chuurch") for form in FORMS]))


def test_it_opens_wherever_the_gate_does_that_is_known(demo_base: Base) -> None:
    """Whatever that opens for, at whatever threshold: its directions stay as they are."""
    lesson, plain, gate = church(demo_base)
    asked = ["a photo of a castle", "a castle painted by Monet"]
    states = States.of(demo_base, [*asked, *lesson.kept(40)])
    other = detector.fit_gate(states, asked * 2, lesson.kept(40), 0)
    other = replace(
        other,
        params=other.params | {"threshold": 3 * other.params["threshold"]},
        tensors=other.tensors | {"query": 3 * other.tensors["query"]},
    )
    whole = slips.fit_gate(demo_base, lesson, (), other, 0)
    assert whole and not any(opened(gate, demo_base, asked))
    assert all(opened(whole, demo_base, [*asked, *(form.format("chrch") for form in FORMS)]))
    for known, made in ((plain, gate), (other, whole)):
        kept = len(known.tensors["query"])
        assert made.tensors["query"][:kept].equal(known.tensors["query"]) and len(made.tensors["query"]) > kept
        assert made.tensors["mean"].equal(known.tensors["mean"])


def test_a_slip_that_is_a_word_means_that_word(demo_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson, _, _ = church(demo_base)
    found, mean = [], torch.zeros(States.of(demo_base, ["a"]).hidden.shape[-1])
    for words in ((), ("chrch", "chruch")):
        known = (*demo_base.vocabulary(), *words)
        monkeypatch.setattr(Base, "vocabulary", lambda self, known=known: known)
        found.append(len(slips._spellings(demo_base, lesson, mean, 0)))
        monkeypatch.undo()
    assert found[0] - found[1] == 2


def test_a_name_that_leaves_no_room_has_no_spelling(sd1: Base) -> None:
    """Its letters apart are more tokens than a text encoder reads."""
    lesson, mean = next(iter(lessons.lessons(sd1, TASK))), torch.zeros(some.width(sd1))
    long = replace(lesson, concept="abracadabra " * 7, synonyms=())
    assert slips._ends(sd1, long, " ".join(long.concept), mean, 0) is None
    assert slips._ends(sd1, lesson, "van gohg", mean, 0).shape == (slips.CARRIERS, len(mean))


def test_what_a_search_found_has_a_direction_too(demo_base: Base) -> None:
    """An embedding that is no word's, in prompts that it was not fitted on; nothing tells a word that stays."""
    lesson, plain, without = church(demo_base)
    table = tables(demo_base)[0]
    strange = table.std() * torch.randn(1, 1, table.shape[1], generator=torch.Generator().manual_seed(0))
    house = table[ids_of(demo_base, "house")][None]

    def said(texts: list[str], embedding: Tensor) -> Found:
        carrier = Carrier.instead(demo_base, texts, lesson.names, 1)
        return Found(carrier.states([embedding.expand(len(texts), -1, -1)]), carrier.slots[:, -1])

    gate = slips.fit_gate(demo_base, lesson, (), plain, 0, [said(lesson.prompts[:6], strange)])
    assert gate and len(gate.tensors["query"]) == len(without.tensors["query"]) + 1
    states = said(lesson.prompts[6:12], strange).cond.states
    assert (gates.margins(gate, states) > 0).all() and not (gates.margins(without, states) > 0).any()
    assert gate.params["false_open"]["rate"] == 0
    assert slips.fit_gate(demo_base, lesson, (), plain, 0, [said(lesson.prompts[:6], house)]) == without


def test_a_name_of_which_no_spelling_can_be_told_has_no_gate(
    demo_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson, plain, _ = church(demo_base)
    monkeypatch.setattr(slips, "CLEAR", 9.0)
    assert slips.fit_gate(demo_base, lesson, (), plain, 0) is None


def test_a_word_stands_where_its_last_token_does(sd1: Base) -> None:
    text = "a photo of a dragonfly wing"
    at = position(sd1, text, "dragonfly")
    upto = sd1.token_ids([text])[0][0, 1 : at + 1].tolist()
    assert upto[-len(ids_of(sd1, "dragonfly")) :] == ids_of(sd1, "dragonfly")
    assert position(sd1, text, "zebra") == sd1.token_count(text)


@pytest.mark.parametrize("told", [True, False])
def test_rows_stand_behind_it_in_place_of_the_gate_it_was_made_of(
    sd1: Base, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others keep theirs, and all of it where no spelling can be told or no threshold is above 0."""
    low, plain, more = (
        replace(some.gate(sd1), params={**some.gate(sd1).params, "threshold": at}) for at in (-1.0, 0.9, 0.8)
    )
    wrong = replace(plain, params={**plain.params, "threshold": 0.5})
    edits = [replace(edit, gates=(gate,)) for gate in (low, plain, more) for edit in some.eraser(sd1)]
    given: list[Gate] = []
    monkeypatch.setattr(slips, "fit_gate", lambda *g: given.append(g[3]) or (wrong if told else None))
    lesson = next(iter(lessons.lessons(sd1, TASK)))
    case = Case(sd1, sd1, lesson, tuple(edits), SMALL, Report())
    found, rows = hardening._told_of(case, some.ASKED, ())
    assert given == [plain]
    assert found == ((low, plain, more, wrong) if told else (low, plain, more))
    assert [edit.gates for edit in rows] == [(low,), (wrong if told else plain,), (more,)]
    assert all("without" in edit.tensors for edit in rows)


def test_a_self_test_asks_for_a_prompt_whose_own_tokens_open_the_gate(sd1: Base) -> None:
    """A self-test reads the beginning of a text alone; the end of the padding does not open a gate in it."""
    text, later = "van gogh", "a painting of a cat in the style of van gogh"
    last = gates.unit(sd1.encode([text]).states[0])[-1]  # of the padding
    end = gates.unit(sd1.encode([later]).states[0])[sd1.token_count(later) + 1]
    tensors = {"query": torch.stack([last, end]), "mean": torch.zeros(len(last))}
    gate = Gate("match", {"threshold": 0.999}, tensors)
    edits = [replace(edit, gates=(gate,)) for edit in some.eraser(sd1)]
    assert opened(gate, sd1, [text])[0]
    with pytest.raises(RefusedError):
        canary.make(sd1, edits, text)
    assert erasing._opening(sd1, edits, [text, later]) == later
    canary.make(sd1, edits, later)
