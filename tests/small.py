"""Every method made small enough for a test, on the tiny base."""

from __future__ import annotations

import dataclasses
from typing import Any

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.registry import config, family
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import lessons

SMALL = {
    "steps": 3, "batch": 2, "trajectories": 2, "rank": 4, "tokens": 2, "size": 2,
    "keep_prompts": 12, "directions": 2, "lr": 0.02, "candidates": 3, "more_rank": 2, "copies": 1,
    "dictionary_steps": 3, "dictionary_rows": 32, "pictures": 2, "expansion": 2, "k": 4, "modulating": 2,
    "rounds": 1, "ratio": 0.0,
}  # fmt: skip
TASK = Task(("cat",), ("dog",), ("horse", "church"))


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of a method that a test can afford."""
    fields = {field.name for field in dataclasses.fields(family.load("methods", name).Config)}
    return {key: value for key, value in SMALL.items() if key in fields} | changes


def edits(base: Base, name: str, task: Task = TASK, **changes: Any) -> list[Edit]:
    """What a method yields for a task."""
    member = family.load("methods", name)
    chosen = config.resolve(member.Config, settings(name, **changes))
    return list(member.erase(base, task, chosen, Report(seed=0)))


def lesson(base: Base, task: Task = TASK) -> lessons.Lesson:
    return next(lessons.lessons(base, task))
