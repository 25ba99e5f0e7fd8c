"""Tables for people: plain ones where there is room, lists where there is none; and what is in a cell."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap.errors import escape
from conceptzap.evaluation import phrases

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

UNITS = ("bytes", "kB", "MB", "GB")
NARROW = 60  # columns under which a table is a list


def table(*heads: str, rows: Iterable[Sequence[object]], title: str = "") -> Listing:
    """A plain table of escaped cells; a head that starts with ">" is a column of numbers."""
    cells = [[escape(cell) for cell in row] for row in rows]
    return Listing(heads, cells, escape(title))


class Listing:
    """A table where there is room for one, else `key: value` a line, for words are never broken."""

    def __init__(self, heads: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
        self.heads, self.rows, self.title = heads, rows, title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text

        if options.max_width >= NARROW:
            yield self._table()
            return
        if self.title:
            yield Text(self.title, "bold")
        yield from (Text(line) for row in self.rows for line in self._lines(row))

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        result = Table(
            box=box.SIMPLE_HEAD,
            title=Text(self.title, "bold") if self.title else None,
            title_justify="left",
            show_header=any(self.heads),
        )
        for head in self.heads:
            numbers = head.startswith(">")
            justify = "right" if numbers else "left"
            result.add_column(Text(head[numbers:]), justify=justify, overflow="fold")
        for row in self.rows:
            result.add_row(*map(Text, row))
        return result

    def _lines(self, row: Sequence[str]) -> list[str]:
        """One row below the other: facts in a line each, longer rows with a blank line between."""
        if not any(self.heads):
            return [": ".join(filter(None, row))]
        named = zip(self.heads, row, strict=True)
        return [f"{head.lstrip('>')}: {cell}".removeprefix(": ") for head, cell in named if cell] + [""]


def size(count: int) -> str:
    """`31 kB`, in powers of 1000."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit >= 2 else f"{value:.0f} {UNITS[unit]}"


def full(path: Path | str | None) -> str | None:
    """The absolute path, as JSON has it; links are kept."""
    return None if path is None else os.path.abspath(path)


def shown(path: Path | str) -> str:
    """A path as short as it can be said from here."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def quoted(text: str) -> str:
    """`text` as a shell takes it, in double quotes where those do."""
    if shlex.quote(text) == text:
        return text
    return shlex.quote(text) if any(c in text for c in '"$`\\!') else f'"{text}"'


def flat(value: Any) -> str:
    """A JSON value in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={flat(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(flat(inner) for inner in value)
    return "" if value is None else str(value)


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> Listing:
    """What `erase` closed with, in percent, with 95 % interval and n; scores of another name as they are."""
    rows = [(phrases.CLOSING.get(name, name), *_figures(name, s), s["n"]) for name, s in scores.items()]
    return table("score", ">value", ">95 %", ">n", rows=rows)


def _figures(name: str, score: Mapping[str, Any]) -> tuple[str, str]:
    value, low, high = (score[key] for key in ("value", "low", "high"))
    if name not in phrases.CLOSING:
        return f"{value:.4g}", f"{low:.4g} - {high:.4g}"
    return f"{100 * value:.1f} %", f"{100 * low:.1f} - {100 * high:.1f} %"
