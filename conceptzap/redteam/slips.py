"""A text gate for a name that is written wrongly.

The gates of the edits know the name as prompts have it; with a slip of the finger in it, it is other tokens
altogether. Each such spelling has a direction of its own, Fisher's linear discriminant of the state at its
last token, where that tells it from everything else, other words written wrongly among it. A slip that is
another word means that word.

Contract: `fit_gate` gives a `match` gate with more directions than the one that it is given: it opens where
that does, for spellings of the concept that can be told, and for no other prompt that must stay; or None
where no spelling can be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Gate
from conceptzap.redteam import spelling
from conceptzap.runtime import gates
from conceptzap.training import detector, lessons, objectives
from conceptzap.training.carrier import position
from conceptzap.training.lessons import Lesson
from conceptzap.training.states import States

RIDGE = 0.01  # of the mean variance, for the discriminants
CLEAR = 0.1  # of a spelling's lowest score: what is as near to it as that has no direction
BETWEEN = 0.5  # where in that gap a spelling's threshold stands
CARRIERS = 8  # prompts of each spelling, the first that alone: half fit its direction, all set its threshold
OTHERS = 128  # other words that are written wrongly, in so many ways each:
WAYS = 3


def fit_gate(base: Base, lesson: Lesson, beside: Sequence[str], known: Gate, seed: int) -> Gate | None:
    """`base` as its text encoder acts; `beside`: prompts of the concepts that are erased with this one.

    `known`: a `match` gate of the same base, its threshold above 0.
    """
    prompts, stay = lessons.sides([lesson])
    shut = [text for text in dict.fromkeys([*stay, *beside]) if text not in prompts]
    every = [*shut, *_others(base, lesson, seed)]
    states = States.of(base, every)
    query, missed = _spellings(base, lesson, states, every, known.tensors["mean"].float(), seed)
    if not len(query):
        return None
    scaled = (known.params["threshold"] * query).to(known.tensors["query"])
    gate = replace(known, tensors=known.tensors | {"query": torch.cat([known.tensors["query"], scaled])})
    opens = detector.judged(gate, states, shut, own=False) > gate.params["threshold"]
    rates = {"false_open": detector.rate(opens), "false_shut": detector.rate(missed)}
    return replace(gate, params=gate.params | rates)


def _spellings(
    base: Base, lesson: Lesson, states: States, stay: Sequence[str], mean: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """A direction for each way to write the name wrongly that can be told, [n, width], its threshold 1.

    And for which of the prompts that it was not fitted on it stays shut, all of them in a row. With two text
    encoders it is one of both: it takes the spelling in both prompts.
    """
    # 1. how the tokens of what stays spread, no padding
    spread, count = torch.zeros(len(mean), len(mean)), 0
    for rows in states.chunks(stay):
        inside = torch.arange(states.hidden.shape[1]) <= states.ends[rows][:, None]
        tokens = _about_mean(states, rows, mean)[inside]  # [tokens, width]
        spread, count = spread + tokens.T @ tokens, count + len(tokens)
    spread = spread / count
    spread += RIDGE * spread.diagonal().mean() * torch.eye(len(spread))
    # 2. one for each spelling, and its scores over prompts, half of which it has not seen
    words = {*base.vocabulary()} - {*lesson.concept.lower().split()}
    wrong = [one for one in spelling.misspelt(lesson.concept) if words.isdisjoint(one.lower().split())]
    own = [_ends(base, lesson, one, mean, seed + number) for number, one in enumerate(wrong)]
    own = [one for one in own if one is not None]
    if not own:
        return torch.zeros(0, len(mean)), torch.zeros(0, dtype=torch.bool)
    found = torch.stack(own)  # [spellings, prompts, width]
    query = torch.linalg.solve(spread, found[:, ::2].mean(1).T).T  # [spellings, width]
    scores = torch.einsum("spw,sw->sp", found, query)
    # 3. those that are clear of all that stays
    tops = [(_about_mean(states, rows, mean) @ query.T).amax((0, 1)) for rows in states.chunks(stay)]
    top, bottom = torch.stack(tops).amax(0), scores.amin(1)
    clear = (bottom - top > CLEAR * bottom.abs()) & (top > 0)
    threshold = top + BETWEEN * (bottom - top)
    return (query / threshold[:, None])[clear], (scores <= threshold[:, None])[clear, 1::2].flatten()


def _ends(base: Base, lesson: Lesson, wrong: str, mean: Tensor, seed: int) -> Tensor | None:
    """States at the last token of the name written wrongly, [CARRIERS, width]; None where it is cut off."""
    turns = [lesson.concept, *objectives.subset(seed, lesson.prompts[1:], CARRIERS - 1)]
    turns = [turns[number % len(turns)] for number in range(CARRIERS)]
    texts = [spelling.reworded(text, lesson.names, wrong) for text in turns]
    at = [position(base, text, wrong) for text in texts]
    if max(at) > base.max_tokens:
        return None
    states = States.of(base, texts)
    return _about_mean(states, states.rows(texts), mean)[range(len(texts)), at]


def _about_mean(states: States, rows: list[int], mean: Tensor) -> Tensor:
    """States as a gate compares them, about its mean: [rows, length, width]."""
    return gates.unit(states.hidden[rows], states.parts) - mean


def _others(base: Base, lesson: Lesson, seed: int) -> list[str]:
    """Prompts for other words, written wrongly; none as the concept's own may be."""
    names = [word.lower() for name in lesson.names for word in (name, *name.split())]
    gone = {*names, *(wrong for word in names for wrong in spelling.misspelt(word))}
    words = objectives.subset(seed, [word for word in base.vocabulary() if word not in gone], OTHERS)
    wrong = [one for word in words for one in objectives.subset(seed, spelling.misspelt(word), WAYS)]
    wrong = [one for one in wrong if one not in gone]
    turns = objectives.subset(seed, lesson.prompts, len(lesson.prompts))
    return [spelling.reworded(turns[i % len(turns)], lesson.names, one) for i, one in enumerate(wrong)]
