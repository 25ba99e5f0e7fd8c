"""A text gate for a name that is written wrongly, and for tokens that were found to do what it does.

The gates of the edits know the name as prompts have it; with a slip of the finger in it, it is other tokens
altogether. Each such spelling, and what a search has found in place of the name, has a direction of its own,
Fisher's linear discriminant of the state at its last token, where that tells it from everything else, other
words written wrongly among it. A slip that is another word means that word.

Contract: `fit_gate` gives a `match` gate with more directions than the one that it is given: it opens where
that does, for spellings of the concept and for what was found as far as they can be told, and for no other
prompt that must stay; or None where none of them can be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Gate
from conceptzap.redteam import spelling
from conceptzap.redteam.finding import Found
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


def fit_gate(
    base: Base, lesson: Lesson, beside: Sequence[str], known: Gate, seed: int, found: Sequence[Found] = ()
) -> Gate | None:
    """`base` as its text encoder acts; `beside`: what must stay beside what the lesson says.

    `known`: a `match` gate of the same base, its threshold above 0. `found`: what stands in for the name.
    """
    prompts, stay = lessons.sides([lesson])
    shut = [text for text in dict.fromkeys([*stay, *beside]) if text not in prompts]
    every = [*shut, *_others(base, lesson, seed)]
    states = States.of(base, every)
    mean = known.tensors["mean"].float()
    own = [*_spellings(base, lesson, mean, seed), *(_ends_of(one, states.parts, mean) for one in found)]
    query, missed = _told_apart(own, states, every, mean)
    if not len(query):
        return None
    scaled = (known.params["threshold"] * query).to(known.tensors["query"])
    gate = replace(known, tensors=known.tensors | {"query": torch.cat([known.tensors["query"], scaled])})
    opens = detector.judged(gate, states, shut, own=False) > gate.params["threshold"]
    rates = {"false_open": detector.rate(opens), "false_shut": detector.rate(missed)}
    return replace(gate, params=gate.params | rates)


def _told_apart(
    own: Sequence[Tensor], states: States, stay: Sequence[str], mean: Tensor
) -> tuple[Tensor, Tensor]:
    """A direction for each of these that can be told from what stays, [n, width], its threshold 1.

    Of each, states in so many prompts, [prompts, width]. And for which of the prompts that it was not fitted
    on it stays shut, all of them in a row. With two text encoders it is one of both: it takes both prompts.
    """
    if not own:
        return torch.zeros(0, len(mean)), torch.zeros(0, dtype=torch.bool)
    # 1. how the tokens of what stays spread, no padding
    spread, count = torch.zeros(len(mean), len(mean)), 0
    for rows in states.chunks(stay):
        inside = torch.arange(states.hidden.shape[1]) <= states.ends[rows][:, None]
        tokens = _about_mean(states, rows, mean)[inside]  # [tokens, width]
        spread, count = spread + tokens.T @ tokens, count + len(tokens)
    spread = spread / count
    spread += RIDGE * spread.diagonal().mean() * torch.eye(len(spread))
    # 2. one for each, and its scores over prompts, half of which it has not seen
    found = torch.stack(list(own))  # [n, prompts, width]
    query = torch.linalg.solve(spread, found[:, ::2].mean(1).T).T  # [n, width]
    scores = torch.einsum("spw,sw->sp", found, query)
    # 3. those that are clear of all that stays
    tops = [(_about_mean(states, rows, mean) @ query.T).amax((0, 1)) for rows in states.chunks(stay)]
    top, bottom = torch.stack(tops).amax(0), scores.amin(1)
    clear = (bottom - top > CLEAR * bottom.abs()) & (top > 0)
    threshold = top + BETWEEN * (bottom - top)
    return (query / threshold[:, None])[clear], (scores <= threshold[:, None])[clear, 1::2].flatten()


def _spellings(base: Base, lesson: Lesson, mean: Tensor, seed: int) -> list[Tensor]:
    """States at the ends of the name written wrongly, [CARRIERS, width] a way to write it."""
    words = {*base.vocabulary()} - {*lesson.concept.lower().split()}
    wrong = [one for one in spelling.misspelt(lesson.concept) if words.isdisjoint(one.lower().split())]
    every = [_ends(base, lesson, one, mean, seed + number) for number, one in enumerate(wrong)]
    return [one for one in every if one is not None]


def _ends_of(found: Found, parts: Sequence[int], mean: Tensor) -> Tensor:
    """The same of what was found, in the first prompts, in turn where they are fewer: [CARRIERS, width]."""
    rows = [number % len(found.cond) for number in range(CARRIERS)]
    states = gates.unit(found.cond.states.float().cpu()[rows], parts) - mean
    return states[range(CARRIERS), found.at[rows]]


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
