"""What is asked of a method: concepts to go, anchors they become, what must stay. No torch."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from conceptzap.errors import UsageError


def clean(text: str, what: str) -> str:
    """NFC without control, format or surrounding characters; raises `UsageError` if nothing is left."""
    kept = (c for c in unicodedata.normalize("NFC", text) if not unicodedata.category(c).startswith("C"))
    result = " ".join("".join(kept).split())
    if not any(character.isalnum() for character in result):
        raise UsageError(f"{what} {text!r} is empty", "name something that a picture can show")
    return result


@dataclass(frozen=True)
class Task:
    """Concepts with their anchors, one each ("" is the empty prompt), and the words to keep.

    `kind` says how concepts are asked for: "style" or one of the others; "" is guessed.
    """

    concepts: tuple[str, ...]
    anchors: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.concepts:
            raise UsageError("no concept given", 'for example: conceptzap erase "Van Gogh"')
        set_ = object.__setattr__
        concepts = dict.fromkeys(clean(concept, "concept") for concept in self.concepts)
        anchors = tuple(clean(a, "anchor") if a else "" for a in self.anchors) or ("",)
        if len(anchors) == 1:
            anchors *= len(concepts)
        if len(anchors) != len(concepts):
            raise UsageError(
                f"{len(anchors)} anchors for {len(concepts)} concepts",
                "give one --anchor for all concepts, or one for each in the same order",
            )
        set_(self, "concepts", tuple(concepts))
        set_(self, "anchors", anchors)
        set_(self, "keep", tuple(dict.fromkeys(clean(k, "keep word") for k in self.keep)))
        for concept, anchor in self.pairs:
            if concept.casefold() == anchor.casefold():
                raise UsageError(f"concept and anchor are both {concept!r}", "choose another --anchor")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(zip(self.concepts, self.anchors, strict=True))
