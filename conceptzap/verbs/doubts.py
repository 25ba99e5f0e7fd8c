"""What can be meant and seldom is: lists in one text, options among concepts, names torn or misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.task import Task

ALIKE = 0.8  # likeness of a name that may have been meant
SEPARATORS = (",", ";", "|")


def warn(task: Task, report: Report) -> None:
    """Warn of every doubt about a task's concepts."""
    for text in _doubts(task.concepts):
        report.warn(text)


def _doubts(concepts: tuple[str, ...]) -> Iterator[str]:
    names = {name.casefold(): name for kind in config.preset_names() for name in _names(kind)}
    whole = names.get(" ".join(concepts).casefold())
    if whole and len(concepts) > 1:
        yield f"{len(concepts)} concepts; for one, quote it: conceptzap erase \"{whole}\""
    for concept in concepts:
        if concept.startswith("-"):
            yield f"{concept!r} is taken as a concept, not as an option"
        if any(sign in concept for sign in SEPARATORS):
            yield f"{concept!r} is one concept; for several, give each its own quotes"
        elif concept.casefold() not in names:
            near = difflib.get_close_matches(concept.casefold(), names, n=1, cutoff=ALIKE)
            if near and sorted(near[0].split()) != sorted(concept.casefold().split()):
                yield f"{concept!r} is taken as it is written; did you mean {names[near[0]]!r}?"


def _names(preset: str) -> list[str]:
    """The names that a preset has words for."""
    return [name for name in config.preset(preset).get("names", ()) if isinstance(name, str)]
