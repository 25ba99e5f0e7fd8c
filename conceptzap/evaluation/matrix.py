"""A bench: methods x concepts x suites under one budget, and what its cells came to. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from conceptzap.edit import Json
from conceptzap.errors import UsageError
from conceptzap.format import naming
from conceptzap.registry import config, family
from conceptzap.result import Result, Score

SCHEMA = "conceptzap.bench/1"
SUITE = "quick"
LOOK = ("steps", "guidance", "batch", "limit")
TEXTS, NUMBERS = ("base", "prediction", "preset", "device", "dtype"), ("seed", *LOOK)
LISTS = ("methods", "concepts", "suites", "attacks", "judges")
ATTACK = "attack-"  # what the column of an attack begins with
NEEDED = {
    "methods": "name some with --method; see `conceptzap methods`",
    "concepts": 'for example: --concept "Van Gogh:painting"',
}
# metric and slice of what is told of every cell, in this order
FIGURES = (
    ("E", ""), ("P", ""), ("H", ""), ("P", "keep/neighbour"), ("E", "erase/synonym"), ("identical", ""),
)  # fmt: skip
ROBUST = ("ASR", "robust")  # what the metrics of an attacked erasure begin with; the worst rate is "ASR"


@dataclass(frozen=True)
class Job:
    """One erasure to be made: a method's, of a concept, with an anchor ("": the usual one)."""

    method: str
    concept: str
    anchor: str = ""

    @property
    def name(self) -> str:
        parts = (self.method, naming.slug(self.concept), naming.slug(self.anchor) if self.anchor else "")
        return "--".join(filter(None, parts))


@dataclass(frozen=True)
class Matrix:
    """What a bench is asked for. `settings`: method -> settings; what it does not say is the default.

    `steps`, `guidance`, `batch`, `limit`: of the pictures, None for the suite's own.
    """

    methods: tuple[str, ...]
    concepts: tuple[str, ...]
    suites: tuple[str, ...] = (SUITE,)
    attacks: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preset: str | None = None
    base: str = "demo"
    prediction: str | None = None
    seed: int = 0
    judges: tuple[str, ...] = ()
    steps: int | None = None
    guidance: float | None = None
    batch: int | None = None
    limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    @property
    def jobs(self) -> list[Job]:
        """Every method on every concept, those of one concept together."""
        return [
            Job(method, concept.strip(), anchor.strip())
            for concept, _, anchor in (one.partition(":") for one in self.concepts)
            for method in self.methods
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        """What every erasure goes through: suites, then attacks."""
        return (*self.suites, *(f"{ATTACK}{name}" for name in self.attacks))

    @property
    def look(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LOOK}

    def record(self) -> dict[str, Json]:
        """The matrix as a TOML file says it."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        settings = {name: dict(own) for name, own in values.pop("settings").items()}
        values |= {name: list(values[name]) for name in LISTS}
        said = {name: value for name, value in values.items() if value not in (None, [])}
        return said | ({"set": settings} if settings else {})

    def budget(self, method: str) -> dict[str, Json]:
        """All that a cell of this method depends on, but for its concept and its column."""
        whole = {name: value for name, value in self.record().items() if name not in LISTS[:4]}
        return whole | {"set": dict(self.settings.get(method, {}))}


def settle(path: Path | str | None, given: Mapping[str, Any]) -> Matrix:
    """The matrix that was asked for: what is given (not None, not empty), over what a TOML file says.

    Raises `UsageError` for a key that means nothing, a value of another type, or nothing to do.
    """
    table = config.read_toml(Path(path)) if path else {}
    known = (*LISTS, *TEXTS, *NUMBERS, "set")
    for key, value in table.items():
        place = config.place(Path(path or ""), key)
        if key not in known:
            raise UsageError(f"{place}: unknown key {key!r}", family.suggest(key, known))
        if not _fits(key, value):
            raise UsageError(f"{place}: {key} = {value!r} is of another type", "correct it in that file")
    asked = table | {key: value for key, value in given.items() if value not in (None, [], (), {})}
    for key, hint in NEEDED.items():
        if not asked.get(key):
            raise UsageError(f"a bench needs {key}", hint)
    settings = asked.pop("set", {})
    lists = {key: tuple(dict.fromkeys(asked[key])) for key in LISTS if key in asked}
    matrix = Matrix(**asked | lists, settings=settings)
    if strange := sorted(set(settings) - set(matrix.methods)):
        raise UsageError(f"settings of {strange[0]!r}, which is not asked for", f"add --method {strange[0]}")
    _check_names(matrix.jobs)
    return matrix


def _fits(key: str, value: Any) -> bool:
    if key == "set":
        return isinstance(value, dict) and all(isinstance(own, dict) for own in value.values())
    if key in LISTS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    kinds = (str,) if key in TEXTS else (int, float) if key == "guidance" else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _check_names(jobs: Sequence[Job]) -> None:
    """Two erasures must not want the same file."""
    found: dict[str, Job] = {}
    for job in jobs:
        other = found.setdefault(job.name, job)
        if other != job:
            pair = f"{other.concept!r} and {job.concept!r}"
            raise UsageError(f"{pair} would be called the same", "bench them in two folders")


@dataclass(frozen=True)
class Cell:
    """A job in one suite, or under an attack (`ATTACK` before its name): what its erasure is and cost,
    and what was measured; or why it failed.

    `seconds` and `peak_bytes` are of making the erasure; `error` has `code`, `kind`, `message`, `hint`.
    """

    job: Job
    suite: str
    file: str = ""
    bytes: int = 0
    digest: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    result: Result | None = None
    error: Mapping[str, Json] | None = None

    @property
    def name(self) -> str:
        return f"{self.job.name}--{self.suite}"

    @property
    def attack(self) -> str:
        """The attack that it is a cell of, "" for a suite's."""
        return self.suite.removeprefix(ATTACK) if self.suite.startswith(ATTACK) else ""

    def score(self, metric: str, slice: str = "") -> Score | None:
        return self.result.score(metric, slice) if self.result else None

    def record(self) -> dict[str, Json]:
        """The same for the same request: no seconds, no memory."""
        return {
            **self._asked(),
            "file": self.file,
            "bytes": self.bytes,
            "digest": self.digest,
            "result": self.result.record() if self.result else None,
            "error": dict(self.error) if self.error else None,
        }

    def costs(self) -> dict[str, Json]:
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes}

    def _asked(self) -> dict[str, Json]:
        job = self.job
        return {"method": job.method, "concept": job.concept, "anchor": job.anchor, "suite": self.suite}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Cell:
        """What `record` and `costs` together say."""
        rest = dict(record)
        job = Job(rest.pop("method"), rest.pop("concept"), rest.pop("anchor"))
        result = rest.pop("result")
        return cls(job, **rest, result=result and Result.from_record(result))


@dataclass(frozen=True)
class Bench:
    """A matrix with its cells, in order. `written`: its files by name; `leads`: whether this process
    is the one among several that writes and tells."""

    matrix: Matrix
    cells: tuple[Cell, ...]
    written: Mapping[str, Path] = field(default_factory=dict)
    leads: bool = True

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.error]

    @cached_property
    def figures(self) -> tuple[tuple[str, str], ...]:
        """Metric and slice of what is told of every cell: those that some cell has."""
        scores = [score for cell in self.cells if cell.result for score in cell.result.scores]
        found = {(score.metric, score.slice): None for score in scores}
        robust = [key for key in found if key[0].startswith(ROBUST) and not key[1]]
        return tuple(key for key in (*FIGURES, *robust) if key in found)

    def record(self) -> dict[str, Json]:
        """All of it but seconds and memory, so that the same bench gives the same bytes."""
        cells = [cell.record() for cell in self.cells]
        return {"schema": SCHEMA, "matrix": self.matrix.record(), "cells": cells}

    def means(self) -> Iterator[tuple[str, str, dict[tuple[str, str], tuple[float, float]], int]]:
        """Suite, method, figure -> its mean and worst over the concepts, and how many those are."""
        for suite in self.matrix.suites:
            for method in self.matrix.methods:
                mine = [c for c in self.cells if (c.suite, c.job.method) == (suite, method) and c.result]
                found = {key: [s for cell in mine if (s := cell.score(*key))] for key in self.figures}
                means = {key: _mean(scores) for key, scores in found.items() if scores}
                yield suite, method, means, len(mine)


def _mean(scores: Sequence[Score]) -> tuple[float, float]:
    values = [score.value for score in scores]
    worst = min(values) if scores[0].better == "higher" else max(values)
    return sum(values) / len(values), worst
