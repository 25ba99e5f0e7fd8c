"""The prompts a method learns from: a concept asked for in several ways, each with its anchor's.

The wordings are data (`presets/prompts/`): one file for styles, one for objects, one for persons by
name. None of them is a wording that the evaluation keeps for itself. `guess_kind` says which of
them a concept is asked for in, `usual_anchor` what it becomes, where nobody said.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from conceptzap.registry import config
from conceptzap.words import with_article

MEDIA = (
    "painting", "photo", "photograph", "picture", "drawing", "sketch", "art", "artwork",
    "oil painting", "watercolor", "print", "illustration", "pencil sketch", "pixel art",
)  # fmt: skip
# what stands for a style in general: an anchor like these says that a style goes
MANNERS = (*MEDIA, "style", "artist", "painter", "illustrator", "image", "artist's style")
STYLE_ENDINGS = (" style", " art", " painting")
PEOPLE = (
    "person", "man", "woman", "boy", "girl", "child", "human", "somebody", "celebrity", "actor",
    "actress", "singer", "politician", "athlete", "model", "musician", "stranger", "people",
)  # fmt: skip
WORDED = ("style", "object", "person")  # kinds with wordings of their own; the others are objects


@dataclass(frozen=True)
class Pair:
    """One way to ask for the concept, and for what should be drawn instead."""

    concept: str
    anchor: str


@cache
def wording(kind: str) -> dict[str, Any]:
    """The wordings of a kind: `things` that fill them, `pairs`, `keep`."""
    return config.preset(kind if kind in WORDED else "object", "prompts")


@cache
def carriers() -> frozenset[str]:
    """Words of the wordings of styles themselves, which speak of any style: no synonym of one of them."""
    asked = (text for pair in (*wording("style")["pairs"], *wording("style")["bare"]) for text in pair)
    return frozenset(re.findall(r"\w+", re.sub(r"\{\w+\}", "", " ".join(asked)).lower()))


def is_name(noun: str) -> bool:
    """Whether a noun is somebody's name: every word of it begins with a capital."""
    return all(word[:1].isupper() for word in noun.split())


def bare(noun: str) -> str:
    """ "a painting" -> "painting"; wordings bring their own articles."""
    return re.sub(r"^(an?|the) (?=\S)", "", noun, flags=re.IGNORECASE)


# -- what kind of concept it is, and what it becomes


@cache
def _known(kind: str) -> frozenset[str]:
    """The concepts that a preset lists as of its kind, in lower case."""
    table = config.preset(kind)
    return frozenset(name.lower() for name in (*table.get("names", ()), *table.get("anchors", ())))


def guess_kind(concept: str, anchor: str | None) -> str:
    """The kind of a concept: by the presets' lists, then by its anchor, then by how it is written."""
    name, target = bare(concept).lower(), bare(anchor or "").lower()
    words = set(name.split())
    # 1. a name that the presets list
    for kind in ("style", "person", "object", "unsafe"):
        if name in _known(kind):
            return kind
    if words & _known("unsafe"):
        return "unsafe"
    # 2. what it becomes, or a word for a manner in its own name
    if target in MANNERS or target in _known("style") or name in MANNERS or name.endswith(STYLE_ENDINGS):
        return "style"
    if (target in PEOPLE or target in _known("person")) and is_name(concept):
        return "person"
    # 3. two or three capitals are a person's, unless one of the words is a thing ("Eiffel Tower")
    things = words & _known("object")
    return "person" if is_name(concept) and len(words) in (2, 3) and not things else "object"


def usual_anchor(concept: str, kind: str) -> str | None:
    """What a concept of a kind becomes where no anchor is given; None is the nearest thing known."""
    table = config.preset(kind)
    own = table.get("anchors", {})
    named = [own[word] for word in (bare(concept).lower(), *concept.lower().split()) if word in own]
    return (named[0] if named else table.get("anchor")) or None


# -- prompts


def pairs(concept: str, anchor: str, kind: str, things: Iterable[str]) -> list[Pair]:
    """Concept and anchor prompts, bare ones first; `things` fill the wordings."""
    ask = _style if kind == "style" else _thing
    return list(dict.fromkeys(ask(bare(concept), bare(anchor), kind, things)))


def _style(concept: str, anchor: str, kind: str, things: Iterable[str]) -> Iterator[Pair]:
    words = wording("style")
    for asked, target in words["bare"]:
        yield Pair(asked.format(c=concept), target.format(a=anchor) if anchor else "")
    named = anchor != anchor.lower()
    for thing in map(with_article, things):
        for asked, target in words["pairs"]:
            if named and asked not in words["swap"]:
                continue
            become = asked.format(t=thing, c=anchor) if named else target.format(t=thing, a=anchor)
            yield Pair(
                asked.format(t=thing, c=concept),
                become if anchor else words["empty"].format(t=thing),
            )


def _thing(concept: str, anchor: str, kind: str, styles: Iterable[str]) -> Iterator[Pair]:
    named = kind == "person" and is_name(anchor)
    become = anchor if named else with_article(anchor)
    for asked, target in wording(kind)["pairs"]:
        for style in styles if "{s}" in asked else ("",):
            prompt = asked.format(s=style, c=concept, tc=with_article(concept))
            yield Pair(prompt, target.format(s=style, ta=become) if anchor else "")


def keep(
    words: Iterable[str], kind: str, things: Iterable[str], gone: Collection[str] = ()
) -> list[str]:
    """Prompts for words that must stay, each word in every wording, things taken in turn, none of `gone`.

    A word's prompts depend on no other word, so that concepts that keep the same word share them.
    """
    things = list(things) or [""]
    result: dict[str, None] = {}
    for word in words:
        for turn, template in enumerate(wording(kind)["keep"], spread(word)):
            after = (things[(turn + more) % len(things)] for more in range(len(things)))
            thing = next((one for one in after if one.lower() not in gone), "")
            named = kind == "person" and is_name(word)
            said = word if named else with_article(bare(word))
            names = {"w": word, "tw": said, "t": with_article(thing), "s": thing}
            result[template.format(**names)] = None
    return list(result)


def spread(word: str) -> int:
    """A number that is the word's in every process: where it begins in lists that are taken in turn."""
    return zlib.crc32(word.encode())
