"""A list of concepts: read whole, or refused by file and line; and a plan for each row. No torch.

A row has a name and may have an anchor, words to keep, a method and a kind; what it leaves out is what the
command says for all. TOML: a table `[[concept]]` a row, or a list `concepts` of names. CSV: a column each,
the first line their names, empty cells left out, words to keep parted by `;`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptzap import edit, format
from conceptzap.edit import Json
from conceptzap.errors import ConceptZapError, UsageError, escape
from conceptzap.format import atomic, naming
from conceptzap.registry import config, family
from conceptzap.task import clean
from conceptzap.verbs import estimates, planning
from conceptzap.verbs.planning import ErasePlan

KEYS = ("name", "anchor", "keep", "method", "kind")
TABLES = ("concept", "concepts")
SEPARATOR = ";"
EXAMPLE = 'for example: [[concept]] and, below it, name = "Van Gogh"'
USUAL = "concepts"  # what the stack and the folder are called that nobody named


@dataclass(frozen=True)
class Row:
    """One concept of a list. What its row leaves out is None or (); `place`: file and line."""

    name: str
    place: str
    anchor: str | None = None
    keep: tuple[str, ...] = ()
    method: str | None = None
    kind: str | None = None


def read(source: Path | str | Iterable[str | Mapping[str, Any]]) -> tuple[Row, ...]:
    """The rows of a file, or of names and mappings with the same keys.

    Raises `UsageError`, with file and line, for a key or value that means nothing, a name that stands
    there twice, and a file that is empty, no UTF-8, or neither TOML nor CSV.
    """
    if isinstance(source, (str, Path)):
        path = naming.place(source)
        rows = tuple(_reader(path)(path, _text(path)))
        shown = str(path)
    else:
        rows = tuple(_row(lambda key, n=n: f"row {n}", one) for n, one in enumerate(source, 1))
        shown = "the list"
    if not rows:
        raise UsageError(f"{shown} names no concept", EXAMPLE)
    return _distinct(rows)


def _reader(path: Path) -> Callable[[Path, str], Iterable[Row]]:
    readers = {".toml": _toml, ".csv": _csv}
    if path.suffix.lower() not in readers:
        hint = "call it .toml or .csv; names alone, one a line, are read by `conceptzap erase @FILE`"
        raise UsageError(f"--from {str(path)!r} is neither TOML nor CSV by its name", hint)
    return readers[path.suffix.lower()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}", "name a readable TOML or CSV file") from error


def _distinct(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows, no two of which are of one name or would be written to one file."""
    seen: dict[str, Row] = {}
    for row in rows:
        first = seen.setdefault(naming.slug(row.name.casefold()), row)
        if first is not row:
            same = first.name.casefold() == row.name.casefold()
            what = "stands" if same else f"would be written to the file of {first.name!r}"
            message = f"{row.place}: {row.name!r} {what} at {first.place}, too"
            raise UsageError(message, "leave one of the two out")
    return rows


# -- a row


def _row(place: Callable[[str], str], given: Any) -> Row:
    """A row of a name alone, or of a mapping; `place` says where a key stands ("" for the row itself)."""
    table = {"name": given} if isinstance(given, str) else given
    if not isinstance(table, Mapping):
        raise UsageError(f"{place('')}: {given!r} is no concept", EXAMPLE)
    for key, value in table.items():
        if key not in KEYS:
            raise UsageError(f"{place(key)}: unknown key {key!r}", family.suggest(str(key), KEYS))
        several = key == "keep" and isinstance(value, (list, tuple))
        if not all(isinstance(one, str) for one in (value if several else [value])):
            kind = "a list of texts" if key == "keep" else "a text"
            raise UsageError(f"{place(key)}: {key} = {value!r} is not {kind}", f"put {key} in quotes")
    if "name" not in table:
        raise UsageError(f"{place('')}: a concept without a name", EXAMPLE)
    try:
        name = clean(table["name"], "name")
    except UsageError as error:
        raise UsageError(f"{place('name')}: {error}", error.hint) from error
    keep = table.get("keep", ())
    rest = {key: table[key] for key in ("anchor", "method", "kind") if key in table}
    return Row(name, place(""), keep=(keep,) if isinstance(keep, str) else tuple(keep), **rest)


# -- TOML


def _toml(path: Path, text: str) -> Iterator[Row]:
    table = config.read_toml(path)
    for key in table:
        if key not in TABLES:
            raise UsageError(f"{config.place(path, key)}: unknown key {key!r}", family.suggest(key, TABLES))
    for key in TABLES:
        items = table.get(key, [])
        if not isinstance(items, list):
            raise UsageError(f"{config.place(path, key)}: {key} is no list of concepts", EXAMPLE)
        places = _places(path, text, key, items) if items else []
        yield from (_row(place, item) for place, item in zip(places, items, strict=True))


def _places(path: Path, text: str, key: str, items: Sequence[Any]) -> list[Callable[[str], str]]:
    """For each row of a list, what says the line of its keys; TOML itself keeps no lines."""
    lines = text.splitlines()
    heads = [n for n, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{key}\s*\]\]", line)]
    if len(heads) != len(items):  # written in one piece: by the first line that says the name
        return [lambda _, item=item: f"{path}{_where(lines, 0, len(lines), item)}" for item in items]

    def place(wanted: str, start: int, end: int) -> str:
        at = re.compile(rf"\s*[\"']?{re.escape(wanted)}[\"']?\s*=")
        found = [n for n in range(start, end) if wanted and at.match(lines[n])]
        return f"{path}:{(found or [start])[0] + 1}"

    ends = [*heads[1:], len(lines)]
    return [lambda k, s=s, e=e: place(k, s, e) for s, e in zip(heads, ends, strict=True)]


def _where(lines: Sequence[str], start: int, end: int, item: Any) -> str:
    name = item.get("name") if isinstance(item, Mapping) else item
    found = [n + 1 for n in range(start, end) if isinstance(name, str) and name and name in lines[n]]
    return f":{found[0]}" if found else ""


# -- CSV


def _csv(path: Path, text: str) -> Iterator[Row]:
    lines = _cells(path, text)
    first, head = next(lines, (1, []))
    names = [cell.strip().lower() for cell in head]
    for name in names:
        if name not in KEYS:
            hint = family.suggest(name, KEYS)
            raise UsageError(f"{path}:{first}: unknown column {escape(name)!r}", hint)
        if names.count(name) > 1:
            raise UsageError(f"{path}:{first}: two columns are called {name!r}", "leave one of them out")
    if head and "name" not in names:
        hint = f"the first line names the columns: {','.join(KEYS)}"
        raise UsageError(f"{path}:{first}: there is no column 'name'", hint)
    for number, cells in lines:
        if len(cells) != len(names):
            hint = 'put what holds a comma in quotes: "a, b"'
            raise UsageError(f"{path}:{number}: {len(cells)} cells for {len(names)} columns", hint)
        given: dict[str, Any] = dict(zip(names, map(str.strip, cells), strict=True))
        words = [word.strip() for word in given.pop("keep", "").split(SEPARATOR)]
        filled = {key: value for key, value in given.items() if value or key == "name"}
        yield _row(lambda _, n=number: f"{path}:{n}", {**filled, "keep": [w for w in words if w]})


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that hold anything, each with its number."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'a quote inside a quoted cell is written twice: "a ""b"""'
            raise UsageError(f"{path}:{number}: {error}", hint) from error
        if any(cell.strip() for cell in cells):
            yield number, cells


# -- what is to be done


@dataclass(frozen=True)
class Plans:
    """An `ErasePlan` for each row of a list, and where the stack of all goes.

    One file each goes to the folder that is called like the stack. `measured`: whether the stack is.
    """

    rows: tuple[Row, ...]
    plans: tuple[ErasePlan, ...]
    stack: Path
    force: bool
    measured: bool

    @property
    def folder(self) -> Path:
        return _folder(self.stack)

    def record(self) -> dict[str, Json]:
        """All of it as `--dry-run` shows it."""
        return {
            "plans": [{**plan.record(), "estimate": estimates.recall(plan)} for plan in self.plans],
            "output": str(self.stack.absolute()),
            "folder": str(self.folder.absolute()),
        }


def resolve(
    source: Path | str | Iterable[str | Mapping[str, Any]],
    *,
    output: Path | str | None = None,
    force: bool = False,
    preview: bool = False,
    limit: int | None = None,
    **request: Any,
) -> Plans:
    """The plans of a list; `request` is what `planning.resolve` takes, and holds where a row says nothing.

    Raises `UsageError` for what cannot be meant, with the row's line, before a base is loaded.
    """
    rows = read(source)
    named = Path(source).stem if isinstance(source, (str, Path)) else USUAL
    place = naming.place(output) if output is not None else Path(named)
    stack = place.with_name((naming.bare(place.name) or named) + naming.SUFFIX)
    folder = _folder(stack)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{escape(folder)} is not a folder", "name another --output")
    atomic.check_writable(stack, force=True)
    _check_stack(stack, rows, force)
    near = folder if folder.is_dir() else stack.parent
    harden = request.get("harden") or planning.budget_of_many(request.get("preset"))
    shared = {**request, "harden": harden, "force": True, "preview": preview, "limit": limit or 0}
    plans = tuple(_plan(row, near, folder, shared) for row in rows)
    return Plans(rows, plans, stack, force, measured=limit != 0)


def _folder(stack: Path) -> Path:
    return stack.with_name(naming.bare(stack.name))


def _check_stack(stack: Path, rows: Sequence[Row], force: bool) -> None:
    """Raise `UsageError` where a stack is there that cannot be one of these concepts."""
    if force or not stack.exists():
        return
    try:
        held = {concept.casefold() for concept in format.read_header(stack).header.concepts}
    except ConceptZapError:
        held = set()
    if held != {row.name.casefold() for row in rows}:
        hint = "name another --output or use --force"
        raise UsageError(f"{escape(stack)} exists and is no stack of these concepts", hint)


def _plan(row: Row, near: Path, folder: Path, request: Mapping[str, Any]) -> ErasePlan:
    """A row's plan; what it may be written to is tried in the nearest folder that is there."""
    name = naming.erasure_path((row.name,)).name
    own = {"anchors": row.anchor, "keep": row.keep, "method": row.method, "kind": row.kind}
    said = {key: value for key, value in own.items() if value not in (None, ())}
    if "anchors" in said:  # "" is the empty prompt
        said["anchors"] = (row.anchor,)
    try:
        plan = planning.resolve(row.name, **{**request, **said, "output": near / name})
    except ConceptZapError as error:
        raise type(error)(f"{row.place}: {error}", error.hint) from error
    output = folder / name
    asked = {**plan.request, "output": output.with_name(naming.bare(name))}
    return dataclasses.replace(plan, output=output, request=asked)


def stacked(plans: Plans) -> edit.Erasure:
    """The stack of all files, whatever their order."""
    return format.seal(edit.stack([format.load(plan.output) for plan in plans.plans]))
