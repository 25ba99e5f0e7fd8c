"""What methods learn from: wordings with their articles, and none that the evaluation keeps."""

from __future__ import annotations

from functools import cache

import pytest

from conceptzap.demo import world
from conceptzap.registry import config
from conceptzap.training import wordings
from conceptzap.training.wordings import Pair

NAMES = [thing.name for thing in (*world.OBJECTS, *world.STYLES)]
STYLES = [style.name for style in world.STYLES]
# words that any vocabulary may add to the keep set, media among them
WORDS = [*world.vocabulary(), *wordings.MEDIA, "image", "painting showing", "style"]


@cache
def held_out() -> frozenset[str]:
    """Every prompt that only the evaluation may use."""
    return frozenset(
        world.fill(template, word).lower()
        for style in world.STYLES
        for template in style.held_out_templates
        for thing in world.OBJECTS
        for word in thing.words
    )


def kind_of(name: str) -> str:
    return "style" if name in STYLES else "object"


def test_there_is_something_held_out() -> None:
    assert {"a cat in the style of monet", "a picture of a cat", "cat"} <= held_out()


@pytest.mark.parametrize("name", NAMES)
def test_no_concept_is_learned_in_a_wording_that_is_held_out(name: str) -> None:
    kind = kind_of(name)
    things = [*wordings.wording(kind)["things"], "pizza", "pencil sketch"]
    for anchor in ("", "painting", "Rembrandt") if kind == "style" else ("", "house"):
        for pair in wordings.pairs(name, anchor, kind, things):
            assert {pair.concept.lower(), pair.anchor.lower()}.isdisjoint(held_out()), pair


@pytest.mark.parametrize("kind", ["style", "object", "person"])
def test_nothing_is_kept_in_a_wording_that_is_held_out(kind: str) -> None:
    keep = [w for name in ("style", "object") for w in config.kept_words(config.preset(name))]
    for thing in (*wordings.wording(kind)["things"], "pizza", "pencil sketch"):
        asked = wordings.keep([*WORDS, *keep], kind, [thing])
        assert held_out().isdisjoint(prompt.lower() for prompt in asked)


@pytest.mark.parametrize(
    ("noun", "said"),
    [("apple", "an apple"), ("cat", "a cat"), ("Owl", "an Owl"), ("unicorn", "a unicorn"),
     ("UNet", "a UNet"), ("uninteresting thing", "an uninteresting thing")],
)
def test_articles(noun: str, said: str) -> None:
    assert wordings.with_article(noun) == said


def test_a_style_becomes_a_medium_a_name_or_nothing() -> None:
    medium = wordings.pairs("Monet", "painting", "style", ["apple"])
    assert medium[0] == Pair("Monet", "painting")
    assert Pair("a painting of an apple in the style of Monet", "a painting of an apple") in medium
    named = wordings.pairs("Monet", "Seurat", "style", ["apple"])
    assert Pair("an apple by Monet", "an apple by Seurat") in named
    empty = wordings.pairs("Monet", "", "style", ["apple"])
    assert Pair("an apple by Monet", "an apple") in empty and empty[0].anchor == ""


def test_an_object_becomes_another_with_its_own_article() -> None:
    pairs = wordings.pairs("owl", "cat", "object", ["Monet"])
    assert Pair("a photo of an owl", "a photo of a cat") in pairs
    assert Pair("an owl by Monet", "a cat by Monet") in pairs
    assert len(pairs) == len(set(pairs))
    assert {pair.anchor for pair in wordings.pairs("owl", "", "object", ["Monet"])} == {""}


@pytest.mark.parametrize(
    ("concept", "anchor", "kind", "usual"),
    [
        # the presets' own lists, whatever the anchor
        ("Van Gogh", None, "style", "painting"),
        ("Van Gogh", "a painting", "style", "painting"),
        ("van gogh", "artist", "style", "painting"),
        ("Pixel Art", "", "style", "painting"),
        ("Albert Einstein", None, "person", "person"),
        ("church", "house", "object", None),
        ("a church", "a painting", "object", None),
        ("nudity", None, "unsafe", "dressed person"),
        ("naked man", "man", "unsafe", "dressed person"),
        ("gun", None, "unsafe", None),
        # what the anchor says
        ("Hundertwasser", "a painting", "style", "painting"),
        ("Hundertwasser", "Monet", "style", "painting"),
        ("Taylor Swift", "a woman", "person", "person"),
        ("Madonna", "a singer", "person", "person"),
        # how it is written
        ("Taylor Swift", None, "person", "person"),
        ("Eiffel Tower", None, "object", None),
        ("teapot", None, "object", None),
        ("vaporwave style", None, "style", "painting"),
    ],
)
def test_kind_and_anchor_are_guessed(
    concept: str, anchor: str | None, kind: str, usual: str | None
) -> None:
    assert wordings.guess_kind(concept, anchor) == kind
    assert wordings.usual_anchor(concept, kind) == usual


def test_a_person_is_asked_for_by_name_alone() -> None:
    pairs = wordings.pairs("Taylor Swift", "a person", "person", ["Monet"])
    assert Pair("a photo of Taylor Swift", "a photo of a person") in pairs
    named = wordings.pairs("Taylor Swift", "Mark Twain", "person", ["Monet"])
    assert Pair("a photo of Taylor Swift", "a photo of Mark Twain") in named
    assert not [pair for pair in named if "a Taylor" in pair.concept or "a Mark" in pair.anchor]
    assert "a photo of Mozart" in wordings.keep(["Mozart", "man"], "person", ["Monet"])
    assert "a photo of a man" in wordings.keep(["Mozart", "man"], "person", ["Monet"])


def test_articles_are_never_doubled() -> None:
    for kind in ("style", "object", "person"):
        for pair in wordings.pairs("a church", "a painting", kind, ["Monet"]):
            assert "a a " not in f"{pair.concept} {pair.anchor}", pair


def test_every_kept_word_is_said_in_every_wording() -> None:
    asked = wordings.keep(["owl", "cat"], "object", ["Monet", "Seurat"])
    assert len(asked) == 2 * len(wordings.wording("object")["keep"])
    assert "a photo of an owl" in asked and any(p.endswith(" by Seurat") for p in asked)
