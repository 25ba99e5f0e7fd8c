"""What a task becomes: a kind and an anchor for each concept, and prompts that fit them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.runtime import gates
from conceptzap.task import Task
from conceptzap.testing import tiny
from conceptzap.training import lessons, subspace, wordings
from conceptzap.verbs import erasing, planning


def fitted(base: Base, concepts: object, **request: object) -> Task:
    plan = planning.resolve(concepts, base="somebody/tiny", **request)  # the demo knows other words
    return erasing.fitting_task(base, plan, Report())


def test_every_concept_is_learned_in_the_wordings_of_its_own_kind(sd1: Base) -> None:
    task = fitted(sd1, ["Monet", "church"], anchors=["painting", "house"])
    assert task.kinds == ("style", "object")
    style, thing = lessons.lessons(sd1, task)
    assert {"a cat by Monet", "a painting by Monet"} <= {pair.concept for pair in style.pairs}
    assert ("a photo of a church", "a photo of a house") in {(p.concept, p.anchor) for p in thing.pairs}
    assert not [pair for pair in thing.pairs if "of a car" in pair.anchor], "a house of a car"


def test_a_kind_may_be_given_once_or_for_each(sd1: Base) -> None:
    given = {"anchors": ["painting", "house"]}
    assert fitted(sd1, ["Monet", "church"], **given, kind="object").kinds == ("object", "object")
    both = fitted(sd1, ["Monet", "church"], **given, kind=["style", "unsafe"])
    assert both.kinds == ("style", "unsafe")
    with pytest.raises(UsageError, match="unknown kind 'thing'"):
        planning.resolve("cat", kind="thing")
    with pytest.raises(UsageError, match="2 kinds for 1 concepts"):
        planning.resolve("cat", kind=["style", "object"])


def test_where_no_anchor_is_given_a_near_one_is_chosen(sd1: Base) -> None:
    task = fitted(sd1, ["Monet", "church", "naked person"])
    style, thing, unsafe = task.anchors
    assert style == "painting"
    assert thing in ("house", "castle", "tree", "apple", "car", "cat", "dog", "horse")
    assert unsafe and unsafe not in ("person", "naked person")  # "dressed" has no token here
    assert fitted(sd1, "church", anchors="").anchors == ("",), "the empty prompt stays possible"
    assert fitted(sd1, "church", preset="paper", method="uce").anchors == ("",)


def test_the_choice_is_said(sd1: Base) -> None:
    class Heard(Report):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    erasing.fitting_task(sd1, planning.resolve("church"), Heard())
    assert len(notes) == 1 and notes[0].startswith("church becomes ")


def test_no_concept_is_kept(sd1: Base) -> None:
    for request in ({}, {"preset": "object"}, {"keep": ["Church", "cat"]}):
        assert "church" not in {word.lower() for word in fitted(sd1, "church", **request).keep}


def test_concepts_differ_in_more_than_capitals() -> None:
    assert Task(("church", "Church", "cat")).concepts == ("church", "cat")


def test_what_stays_does_not_speak_of_what_goes(sd1: Base) -> None:
    """"a sketch of a cat" is how pictures are asked for, and what a sketch is: no gate can tell both."""
    for concept, kind in (("sketch", "style"), ("photo", "style"), ("cat", "object")):
        lesson = next(lessons.lessons(sd1, Task((concept,), ("painting",), ("red", "tree"), (kind,))))
        assert lesson.keep and not [p for p in lesson.keep if concept in p.replace(",", " ").split()]
        assert not set(lesson.beside) & {*lesson.names, *lesson.keep}


def test_sdxl_a_concept_in_either_prompt_opens_the_gate() -> None:
    """Each text encoder may read a prompt of its own, as in diffusers' `prompt_2`.

    A random encoder hardly tells prompts apart: what counts is that either half is above all that stays.
    """
    base = tiny("sdxl")
    (lesson,) = lessons.lessons(base, fitted(base, "church", anchors="house"))
    gate = lessons.gate(base, [lesson], seed=0, keep_prompts=100)
    asked, other = ["a photo of a church", "a church"], ["a photo of a car", "a house"]
    scores = [
        gates.scores(gate, base.encode(*prompts).states).amax(1)  # [2]
        for prompts in ((other, other), (asked, other), (other, asked), (asked, asked))
    ]
    bar = max(gate.params["threshold"], scores[0].max().item())
    assert gate.params["parts"] == [24, 40] and all((one > bar).all() for one in scores[1:]), scores


def test_concepts_that_keep_the_same_words_keep_the_same_prompts(sd1: Base) -> None:
    """So that a list reads them once; and any number of them asks for all words alike."""
    cat, church = (
        next(lessons.lessons(sd1, Task((name,), ("dog",), ("red", "tree", "house"), ("object",))))
        for name in ("cat", "church")
    )
    assert len({*cat.keep} & {*church.keep}) > 0.8 * len(cat.keep)
    few = [prompt.split() for prompt in cat.kept(40)]
    assert len(few) == 40 and all(any(word in asked for asked in few) for word in ("red", "tree", "house"))


def test_what_only_a_gate_must_know_is_read_for_a_gate_alone(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = fitted(sd1, ["cat"], anchors=["dog"], keep=["horse"])
    told = replace(next(lessons.lessons(sd1, task)), beside=("red", "blue"))
    asked: list[set[str]] = []
    encode = sd1.encode
    monkeypatch.setattr(sd1, "encode", lambda prompts: asked.append(set(prompts)) or encode(prompts))
    whole = lessons.read(sd1, told, 4)
    assert {"red", "blue"} < whole.index.keys() and {"red", "blue"} < set().union(*asked)
    asked.clear()
    bare, plain = lessons.read(sd1, told, 4, gated=False), subspace.states_of(sd1, [told], 4)
    assert not {"red", "blue"} & set().union(*asked) and len(bare.index) == len(whole.index) - 2
    sums = [lessons.moves(sd1, told, states, 4)[0] for states in (whole, bare)]
    assert sums[0].kept.equal(sums[1].kept) and len(plain.source) == sums[0].n


def test_a_carrier_of_every_style_is_no_synonym_of_one(sd1: Base) -> None:
    """ "art by Monet" speaks of no pixel art, however near "art" is to it."""
    (lesson,) = lessons.lessons(sd1, Task(("photo art",), ("painting",), ("tree",), ("style",)))
    assert {"art", "style", "painting"} <= wordings.carriers() and not set(lesson.names) & wordings.carriers()
    assert not {"monet", "cat", "photo", "sketch"} & wordings.carriers()


def test_things_are_crossed_with_styles_and_nothing_is_the_concept(demo_base: Base) -> None:
    """Church's own wordings know five painters, Van Gogh not among them; a gate that looks must know him, too."""
    for concept, anchor in (("church", "house"), ("Van Gogh", "painting")):
        (lesson,) = lessons.lessons(demo_base, Task((concept,), (anchor,)))
        asked = lessons.in_styles(demo_base, lesson)
        assert len(asked) == len(set(asked)) and {"a tiger by Monet", "a painting of a bee in the style of Seurat"} <= {*asked}
        assert ("a tiger by Van Gogh" in asked) == (concept == "church")
        assert not [prompt for prompt in asked if concept.lower() in prompt.lower()]
        assert not demo_base.unknown_words(" ".join(asked[:50]))
