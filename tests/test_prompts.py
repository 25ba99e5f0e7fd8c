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


@pytest.mark.parametrize("kind", ["style", "object"])
def test_nothing_is_kept_in_a_wording_that_is_held_out(kind: str) -> None:
    keep = config.preset("style")["keep"] + config.preset("object")["keep"]
    for thing in (*wordings.wording(kind)["things"], "pizza", "pencil sketch"):
        asked = wordings.keep([*WORDS, *keep], kind, [thing])
        assert held_out().isdisjoint(prompt.lower() for prompt in asked)


@pytest.mark.parametrize(
    ("noun", "said"), [("apple", "an apple"), ("cat", "a cat"), ("Owl", "an Owl")]
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


def test_a_kind_is_guessed_from_the_medium() -> None:
    assert wordings.guess_kind("Monet", "painting") == "style"
    assert wordings.guess_kind("Pixel Art", "") == "style"
    assert wordings.guess_kind("church", "house") == "object"


def test_every_kept_word_is_said_in_every_wording() -> None:
    asked = wordings.keep(["owl", "cat"], "object", ["Monet", "Seurat"])
    assert len(asked) == 2 * len(wordings.wording("object")["keep"])
    assert "a photo of an owl" in asked and any(p.endswith(" by Seurat") for p in asked)
