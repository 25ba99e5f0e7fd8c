"""The prompts a method learns from: a concept asked for in several ways, each with its anchor's.

The wordings are data (`presets/prompts/`), one file for styles and one for objects, and hold none
of the wordings that the evaluation keeps for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from conceptzap.registry import config

MEDIA = (
    "painting", "photo", "photograph", "picture", "drawing", "sketch", "art", "artwork",
    "oil painting", "watercolor", "print", "illustration", "pencil sketch", "pixel art",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One way to ask for the concept, and for what should be drawn instead."""

    concept: str
    anchor: str


@cache
def wording(kind: str) -> dict[str, Any]:
    return config.preset(kind if kind == "style" else "object", "prompts")


def with_article(noun: str) -> str:
    """ "apple" -> "an apple"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def guess_kind(concept: str, anchor: str) -> str:
    """ "style" where the anchor is a medium, else "object"; a preset says it outright."""
    return "style" if {concept.lower(), anchor.lower()} & set(MEDIA) else "object"


def pairs(concept: str, anchor: str, kind: str, things: Iterable[str]) -> list[Pair]:
    """Concept and anchor prompts, bare ones first; `things` fill the wordings."""
    ask = _style if kind == "style" else _object
    return list(dict.fromkeys(ask(concept, anchor, things)))


def _style(concept: str, anchor: str, things: Iterable[str]) -> Iterator[Pair]:
    words = wording("style")
    for asked, instead in words["bare"]:
        yield Pair(asked.format(c=concept), instead.format(a=anchor) if anchor else "")
    named = anchor != anchor.lower()
    for thing in map(with_article, things):
        for asked, instead in words["pairs"]:
            if named and asked not in words["swap"]:
                continue
            target = asked.format(t=thing, c=anchor) if named else instead.format(t=thing, a=anchor)
            yield Pair(
                asked.format(t=thing, c=concept),
                target if anchor else words["empty"].format(t=thing),
            )


def _object(concept: str, anchor: str, styles: Iterable[str]) -> Iterator[Pair]:
    words = wording("object")
    for asked, instead in words["pairs"]:
        for style in styles if "{s}" in asked else ("",):
            names = {"s": style, "tc": with_article(concept)}
            target = instead.format(s=style, ta=with_article(anchor)) if anchor else ""
            yield Pair(asked.format(**names), target)


def keep(words: Iterable[str], kind: str, things: Iterable[str]) -> list[str]:
    """Prompts for words that must stay, each word in every wording, things taken in turn."""
    things = list(things) or [""]
    result: dict[str, None] = {}
    for number, word in enumerate(words):
        for turn, template in enumerate(wording(kind)["keep"]):
            thing = things[(number + turn) % len(things)]
            names = {"w": word, "tw": with_article(word), "t": with_article(thing), "s": thing}
            result[template.format(**names)] = None
    return list(result)
