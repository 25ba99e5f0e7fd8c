"""What reaches the streams, and how loud: results to stdout, notes and signs of life to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 160
WISHES = {"quiet": False, "detail": 0, "progress": True, "colour": True}
_wishes = dict(WISHES)
_moving: list[Any] = []  # what moves on the terminal until something is printed


def begin() -> None:
    """Forget what an earlier command of this process was asked for."""
    settle()
    _wishes.update(WISHES)


def moving(sign: Any) -> None:
    """Something that moves, with a `stop()`, from now until anything is printed."""
    settle()
    _moving.append(sign)


def settle() -> None:
    """Nothing moves any more."""
    while _moving:
        _moving.pop().stop()


def ask(**wishes: int) -> None:
    """How the user wants it: `quiet`, `detail` (0 to 2), `progress`, `colour`."""
    _wishes.update(wishes)


def is_quiet() -> bool:
    """Whether stderr gets nothing but errors, and stdout nothing but names."""
    return bool(_wishes["quiet"])


def wants_progress() -> bool:
    return bool(_wishes["progress"]) and not is_quiet()


def wants_colour() -> bool:
    return bool(_wishes["colour"])


def wants_detail(level: int = 1) -> bool:
    return _wishes["detail"] >= level


def one_line(text: str) -> str:
    """White space joined to single blanks; what cannot be printed, escaped."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


def note(text: str) -> None:
    """One line for whoever watches."""
    settle()
    if not is_quiet():
        print(one_line(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    note(f"warning: {text}")


def detail(text: str) -> None:
    """One line for whoever asked for more."""
    if wants_detail():
        note(text)


def lines(texts: Iterable[object]) -> None:
    """The result itself, one a line."""
    settle()
    for text in texts:
        print(text, flush=True)


def emit(kind: str, record: Mapping[str, Any]) -> None:
    """One JSON object on stdout, in the schema `conceptzap.<kind>/1`."""
    settle()
    print(json.dumps({"schema": f"conceptzap.{kind}/1", **record}, allow_nan=False), flush=True)


def console(stream: Any = None) -> Console:
    """A console on `stream` (stdout); wide where nobody watches, so that names are not cut."""
    from rich.console import Console

    settle()
    stream = stream or sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    plain = os.environ.get("NO_COLOR") or not _wishes["colour"]
    colours = None if plain else "auto"
    return Console(file=stream, width=width, highlight=False, emoji=False, color_system=colours)
