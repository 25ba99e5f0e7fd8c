"""What a method learns one concept from: how it is asked for, its synonyms, and what must stay.

All of it comes from the task, the shipped word lists and the base's own vocabulary and text encoder;
nothing that scores are computed on takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conceptzap.base import Base
from conceptzap.edit import Gate
from conceptzap.task import Task
from conceptzap.training import detector, wordings
from conceptzap.training.wordings import Pair

NEAREST = 80  # words of the vocabulary that join the keep set
CANDIDATES = 2000  # of a large vocabulary, in its own order, are compared at all


@dataclass(frozen=True)
class Lesson:
    """One concept of a task. `pairs` ask for it and its synonyms, `keep` are prompts that must stay."""

    concept: str
    anchor: str
    kind: str
    synonyms: tuple[str, ...]
    pairs: tuple[Pair, ...]
    keep: tuple[str, ...]

    def kept(self, n: int) -> list[str]:
        """n prompts of the keep set, spread evenly over it."""
        stride = max(1, len(self.keep) // max(1, n))
        return list(self.keep[::stride][:n])

    @property
    def asked(self) -> list[str]:
        return [pair.concept for pair in self.pairs]

    @property
    def instead(self) -> list[str]:
        return [pair.anchor for pair in self.pairs]


def lessons(base: Base, task: Task) -> Iterator[Lesson]:
    """One lesson for each concept of the task; the other concepts are in nobody's keep set."""
    for concept, anchor in task.pairs:
        yield _lesson(base, task, concept, anchor)


def gate(
    base: Base, told: Sequence[Lesson], seed: int, keep_prompts: int = 400, directions: int = 4
) -> Gate:
    """Opens for the concepts of the lessons; shut for the empty prompt, the anchors, what must stay."""
    asked = [prompt for lesson in told for prompt in lesson.asked]
    instead = [prompt for lesson in told for prompt in lesson.instead]
    kept = [prompt for lesson in told for prompt in lesson.kept(keep_prompts // len(told))]
    shut = list(dict.fromkeys(["", *instead, *kept]))
    return detector.fit_gate(base, asked, shut, seed, directions)


def _lesson(base: Base, task: Task, concept: str, anchor: str) -> Lesson:
    kind = task.kind or wordings.guess_kind(concept, anchor)
    near = detector.neighbours(base, concept, [*base.vocabulary()[:CANDIDATES], *task.keep])
    synonyms = tuple(word for word, cosine in near if cosine > detector.SYNONYM and word != anchor)
    words = [word for word, _ in near if word not in synonyms]
    named = _known(base, [*task.keep, anchor])
    kept = dict.fromkeys(word for word in [*named, *words[:NEAREST]] if word)
    gone = {word.lower() for name in (*task.concepts, *synonyms) for word in (name, *name.split())}
    kept = [word for word in kept if word.lower() not in gone]
    asked = [p for name in (concept, *synonyms) for p in _pairs(base, name, anchor, kind, gone)]
    return Lesson(concept, anchor, kind, synonyms, tuple(asked), tuple(_keep(base, kept, gone)))


def _known(base: Base, words: list[str]) -> list[str]:
    return [word for word in words if not base.unknown_words(word)]


def _things(base: Base, kind: str, gone: set[str]) -> list[str]:
    return [
        thing
        for thing in _known(base, wordings.wording(kind)["things"])
        if thing.lower() not in gone
    ]


def _pairs(base: Base, name: str, anchor: str, kind: str, gone: set[str]) -> list[Pair]:
    strange = set(base.unknown_words(f"{name} {anchor}"))
    things = _things(base, kind, gone)
    asked = wordings.pairs(name, anchor, kind, things)
    return [p for p in asked if set(base.unknown_words(f"{p.concept} {p.anchor}")) <= strange]


def _keep(base: Base, words: list[str], gone: set[str]) -> list[str]:
    asked = [
        "",
        *(
            p
            for kind in ("style", "object")
            for p in wordings.keep(words, kind, _things(base, kind, gone))
        ),
    ]
    return [prompt for prompt in dict.fromkeys(asked) if not base.unknown_words(prompt)]
