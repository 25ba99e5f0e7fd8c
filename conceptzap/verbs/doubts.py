"""What can be meant and seldom is: lists in one text, options among concepts, names torn or misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from conceptzap.errors import escape
from conceptzap.registry import config, family
from conceptzap.report import Report
from conceptzap.task import Task

ALIKE = 0.8  # likeness of a name that may have been meant
NEAR = 0.6  # the same of a single word
KNOWN = "what it knows: conceptzap demo --words"
SEPARATORS = (",", ";", "|")


def warn(task: Task, report: Report) -> None:
    """Warn of every doubt about a task's concepts."""
    for text in _doubts(task.concepts):
        report.warn(text)


def instead(name: str, word: str, known: Iterable[str], base: str) -> str:
    """The hint for a name with a `word` that a base does not know: what may have been meant."""
    words = sorted(known)
    meant = _meant(name)
    if meant and set(re.findall(r"\w+", meant.lower())) <= set(words):
        return f"did you mean {meant}?"
    return nearest(word, words) or (KNOWN if base == "demo" else family.suggest(word, words))


def nearest(word: str, known: Iterable[str]) -> str:
    """The one or two known words that a word may have been meant for, as a question, or ""."""
    near = difflib.get_close_matches(word, sorted(known), n=2, cutoff=NEAR)
    return f"did you mean {' or '.join(map(escape, near))}?" if near else ""


def _meant(concept: str) -> str:
    """The preset's name that a concept is nearly called, "" for none, or for just this one."""
    names = _all_names()
    near = difflib.get_close_matches(concept.casefold(), names, n=1, cutoff=ALIKE)
    same = near and sorted(near[0].split()) == sorted(concept.casefold().split())
    return names[near[0]] if near and not same else ""


def _doubts(concepts: tuple[str, ...]) -> Iterator[str]:
    names = _all_names()
    whole = names.get(" ".join(concepts).casefold())
    if whole and len(concepts) > 1:
        yield f"{len(concepts)} concepts; for one, quote it: conceptzap erase \"{whole}\""
    for concept in concepts:
        if concept.startswith("-"):
            yield f"{concept!r} is taken as a concept, not as an option"
        if any(sign in concept for sign in SEPARATORS):
            yield f"{concept!r} is one concept; for several, give each its own quotes"
        elif concept.casefold() not in names and (meant := _meant(concept)):
            yield f"{concept!r} is taken as it is written; did you mean {meant!r}?"


def _all_names() -> dict[str, str]:
    """The names that the presets have words for, by how they are compared."""
    return {name.casefold(): name for kind in config.preset_names() for name in _names(kind)}


def _names(preset: str) -> list[str]:
    """The names that a preset has words for."""
    return [name for name in config.preset(preset).get("names", ()) if isinstance(name, str)]
