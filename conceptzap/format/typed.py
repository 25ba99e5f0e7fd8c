"""JSON that somebody else wrote, read as what it must be: the value itself, or a `FormatError`.

`where` names the place in the message, for example `edit 0123456789ab: scale`. No torch.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TypeVar

from conceptzap.edit import Json
from conceptzap.errors import FormatError, escape

T = TypeVar("T")
GET_AGAIN = "the file is damaged or was altered: get it again"
NEWER = "if it is sound, it needs a newer conceptzap: pip install --upgrade conceptzap"


def typed(value: Json, kind: type[T], where: str) -> T:
    """`value`, if it is of this very type (`True` is no int, 1 no float)."""
    if type(value) is not kind:
        raise FormatError(f"{where}: {escape(value)} is not of type {kind.__name__}", GET_AGAIN)
    return value


def text(value: Json, where: str) -> str:
    return typed(value, str, where)


def mapping(value: Json, where: str) -> dict[str, Json]:
    return typed(value, dict, where)


def sequence(value: Json, where: str) -> list[Json]:
    return typed(value, list, where)


def texts(value: Json, where: str) -> tuple[str, ...]:
    return tuple(text(one, where) for one in sequence(value, where))


def number(value: Json, where: str, low: float, high: float) -> float:
    """`value`, if it is an int or a float from `low` to `high`; NaN lies nowhere."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise FormatError(f"{where}: {escape(value)} is no number from {low:g} to {high:g}", GET_AGAIN)
    return value


def whole(value: Json, where: str, low: int, high: int) -> int:
    """`value`, if it is an int from `low` to `high`."""
    typed(value, int, where)
    number(value, where, low, high)
    return value


def one_of(value: Json, where: str, known: Container[str]) -> str:
    name = text(value, where)
    if name not in known:
        raise FormatError(f"{where} {escape(name)!r} is unknown", NEWER)
    return name


def fields(
    value: Json, where: str, needed: frozenset[str], optional: frozenset[str] = frozenset()
) -> dict[str, Json]:
    """A mapping with all the `needed` fields, and no others but `optional` ones."""
    found = mapping(value, where)
    if missing := sorted(needed - found.keys()):
        raise FormatError(f"{where} lacks {missing[0]!r}", GET_AGAIN)
    if odd := sorted(found.keys() - needed - optional):
        raise FormatError(f"{where} has an unknown {escape(odd[0])!r}", NEWER)
    return found
