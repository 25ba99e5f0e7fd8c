"""Erasures as they are asked for, and whether one may act on a base: it fits, it is alive. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap import format
from conceptzap.edit import MAX_ROWS, Edit, Erasure, token_count
from conceptzap.errors import MismatchError, UsageError
from conceptzap.format import naming
from conceptzap.report import Report

if TYPE_CHECKING:
    from conceptzap.base import Base

Source = Path | str | Erasure
Asked = Source | tuple[Source, float]
MAX_STRENGTH = 2.0


@dataclass(frozen=True)
class Loaded:
    """An erasure with where it came from (None: a value) and how strong it is to be, 0 to 2."""

    erasure: Erasure
    path: Path | None
    strength: float = 1.0

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit.scaled(self.strength) for edit in self.erasure.edits)


def read(source: Source) -> Erasure:
    """The erasure in a file, or a value as its file would give it back, with its digest."""
    return format.seal(source) if isinstance(source, Erasure) else format.load(source)


def listed(items: Asked | Iterable[Asked]) -> list[Asked]:
    """One erasure, one with its strength, or several of either, as several."""
    pair = isinstance(items, tuple) and len(items) == 2 and isinstance(items[1], Real)
    return [items] if pair or isinstance(items, Source) else list(items)


def load_all(items: Asked | Iterable[Asked]) -> tuple[Loaded, ...]:
    """The erasures asked for, each once.

    Raises `FormatError` like `format.load` and `UsageError` for a strength out of range, for one
    erasure with two strengths, or for more than `MAX_ROWS` learned tokens at one cross-attention
    that are always open.
    """
    found: dict[str, Loaded] = {}
    for item in listed(items):
        one = _load(item)
        first = found.setdefault(one.erasure.digest, one)
        if first.strength != one.strength:
            raise UsageError(
                f"{one.erasure.header.title!r} is asked for at the strengths"
                f" {first.strength:g} and {one.strength:g}",
                "give each erasure once",
            )
    _check_rows(found.values())
    return tuple(found.values())


def _check_rows(loaded: Iterable[Loaded]) -> None:
    """Rows behind a gate count when they open, in the UNet call that they are open in."""
    rows: Counter[str] = Counter()
    edits = (edit for one in loaded if one.strength for edit in one.erasure.edits)
    for edit in (edit for edit in edits if edit.op == "tokens" and not edit.gates):
        rows.update(dict.fromkeys(edit.sites, token_count(edit)))
    most = max(rows.values(), default=0)
    if most > MAX_ROWS:
        raise UsageError(
            f"these erasures add {most} learned tokens to one prompt",
            f"together they may add {MAX_ROWS}; use fewer, or ones without learned tokens",
        )


def _load(item: Asked) -> Loaded:
    source, strength = item if isinstance(item, tuple) else (item, 1.0)
    strength = check_strength(strength)
    path = None if isinstance(source, Erasure) else naming.existing(source)
    return Loaded(read(source if path is None else path), path, strength)


def check_strength(strength: object) -> float:
    """The strength as a number; `UsageError` unless it is one, 0 to 2."""
    number = type(strength) in (int, float)
    if not (number and math.isfinite(strength) and 0 <= strength <= MAX_STRENGTH):
        raise UsageError(f"strength {strength!r} is out of range", "use a number, 0 to 2")
    return float(strength)


def admit(base: Base, erasure: Erasure, strict: bool, report: Report) -> bool:
    """`admit_all` for one."""
    return admit_all(base, [erasure], strict, report)[0]


def admit_all(base: Base, erasures: Sequence[Erasure], strict: bool, report: Report) -> list[bool]:
    """Whether each is of another checkpoint (then `report` is warned), once all may act here.

    Raises `MismatchError` for another architecture, and with `strict` for another checkpoint;
    `RefusedError` when an edit does not act here as its self-test says.
    """
    from conceptzap.trust import canary

    foreign = [fits(base, erasure, strict) for erasure in erasures]
    canary.check_all(base, [(one, not away) for one, away in zip(erasures, foreign, strict=True)])
    for erasure, away in zip(erasures, foreign, strict=True):
        if away:
            report.warn(f"{_elsewhere(erasure)} than {base.id}")
    return foreign


def fits(base: Base, erasure: Erasure, strict: bool) -> bool:
    """Whether an erasure is of another checkpoint of the base's architecture; raises as `admit_all` does."""
    made_for = erasure.header.base
    if made_for.signature != base.signature:
        raise MismatchError(
            f"{erasure.header.title!r} was made for {made_for.id} ({made_for.family}),"
            f" {base.id} ({base.family}) has another architecture",
            "use the base it was made for, or make the erasure on this one",
        )
    foreign = is_foreign(base, erasure)
    if foreign and strict:
        hint = "make the erasure on this checkpoint, or do not ask for strictness"
        raise MismatchError(f"{_elsewhere(erasure)} than {base.id}", hint)
    return foreign


def _elsewhere(erasure: Erasure) -> str:
    return f"{erasure.header.title!r} was made and measured on another checkpoint"


def is_foreign(base: Base, erasure: Erasure) -> bool:
    """Whether the weights that an erasure depends on are others here than where it was made."""
    here = base.fingerprint(site for one in erasure.edits for site in one.modules)
    return any(here.get(part) != mark for part, mark in erasure.header.base.fingerprint.items())
