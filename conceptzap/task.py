"""What is asked of a method: concepts to go, anchors they become, what must stay. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from conceptzap.errors import UsageError

KINDS = ("style", "object", "person", "unsafe")


def clean(text: str, what: str) -> str:
    """NFC without control, format or surrounding characters; raises `UsageError` if nothing is left."""
    kept = (c for c in unicodedata.normalize("NFC", text) if not unicodedata.category(c).startswith("C"))
    result = " ".join("".join(kept).split())
    if not any(character.isalnum() for character in result):
        raise UsageError(f"{what} {text!r} is empty", "name something that a picture can show")
    return result


@dataclass(frozen=True)
class Task:
    """Concepts, each with its anchor and its kind, and the words to keep.

    An anchor is "" for the empty prompt, None for the nearest thing that the base knows. A kind is
    one of `KINDS` and says how a concept is asked for; "" is guessed. One anchor or one kind stands
    for all concepts, none for "" each.
    """

    concepts: tuple[str, ...]
    anchors: tuple[str | None, ...] = ()
    keep: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.concepts:
            raise UsageError("no concept given", 'for example: conceptzap erase "Van Gogh"')
        set_ = object.__setattr__
        named = [clean(concept, "concept") for concept in self.concepts]
        concepts = tuple({name.casefold(): name for name in reversed(named)}.values())[::-1]
        anchors = tuple(clean(a, "anchor") if a else a for a in self.anchors)
        set_(self, "concepts", concepts)
        set_(self, "anchors", _one_each(anchors, len(concepts), "anchor"))
        set_(self, "kinds", _one_each(tuple(self.kinds), len(concepts), "kind"))
        set_(self, "keep", tuple(dict.fromkeys(clean(k, "keep word") for k in self.keep)))
        for concept, anchor, kind in self.triples:
            if concept.casefold() == (anchor or "").casefold():
                raise UsageError(f"concept and anchor are both {concept!r}", "choose another --anchor")
            if kind and kind not in KINDS:
                raise UsageError(f"unknown kind {kind!r}", f"use {', '.join(KINDS)}")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Concept and anchor, one pair a concept."""
        return tuple((concept, anchor or "") for concept, anchor, _ in self.triples)

    @property
    def triples(self) -> tuple[tuple[str, str | None, str], ...]:
        """Concept, anchor and kind, one triple a concept."""
        return tuple(zip(self.concepts, self.anchors, self.kinds, strict=True))


def _one_each(values: Sequence[str | None], count: int, what: str) -> tuple[str | None, ...]:
    values = tuple(values) or ("",)
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise UsageError(
            f"{len(values)} {what}s for {count} concepts",
            f"give one --{what} for all concepts, or one for each in the same order",
        )
    return values
