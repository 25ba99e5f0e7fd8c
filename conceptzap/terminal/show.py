"""Everything that is printed: results to stdout, notes and hints to stderr.

Names that come from files go through `files.escape` and into `rich` as text, never as markup.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap.errors import escape

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNITS = ("bytes", "kB", "MB", "GB")
PIPE_WIDTH = 160
DEFAULT_BASE = "demo"
WISHES = {"quiet": False, "detail": 0, "progress": True, "colour": True}
_wishes = dict(WISHES)


def begin() -> None:
    """Forget what an earlier command of this process was asked for."""
    _wishes.update(WISHES)


def ask(**wishes: int) -> None:
    """How the user wants it: `quiet`, `detail` (0 to 2), `progress`, `colour`."""
    _wishes.update(wishes)


def is_quiet() -> bool:
    """Whether stderr gets nothing but errors, and stdout nothing but names."""
    return bool(_wishes["quiet"])


def wants_progress() -> bool:
    return bool(_wishes["progress"]) and not is_quiet()


def wants_detail(level: int = 1) -> bool:
    return _wishes["detail"] >= level


def one_line(text: str) -> str:
    """White space joined to single blanks; what cannot be printed, escaped."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


def note(text: str) -> None:
    """One line for whoever watches."""
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
    for text in texts:
        print(text, flush=True)


def emit(kind: str, record: Mapping[str, Any]) -> None:
    """One JSON object on stdout, in the schema `conceptzap.<kind>/1`."""
    print(json.dumps({"schema": f"conceptzap.{kind}/1", **record}, allow_nan=False), flush=True)


def console(stream: Any = None) -> Console:
    """A console on `stream` (stdout); wide where nobody watches, so that names are not cut."""
    from rich.console import Console

    stream = stream or sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    plain = os.environ.get("NO_COLOR") or not _wishes["colour"]
    colours = None if plain else "auto"
    return Console(file=stream, width=width, highlight=False, emoji=False, color_system=colours)


def table(*heads: str, rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """A plain table of escaped cells; a head that starts with ">" is a column of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(
        box=box.SIMPLE_HEAD,
        title=Text(escape(title), "bold") if title else None,
        title_justify="left",
        show_header=any(heads),
    )
    for head in heads:
        numbers = head.startswith(">")
        result.add_column(head[numbers:], justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(escape(cell)) for cell in row))
    return result


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


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Name, value, 95 % interval and n of each score."""
    rows = [
        (name, f"{s['value']:.4g}", f"{s['low']:.4g} - {s['high']:.4g}", s["n"])
        for name, s in scores.items()
    ]
    return table("score", ">value", ">95 %", ">n", rows=rows)


# erase


def erased_record(made: Any) -> dict[str, Any]:
    """What `erase --json` says."""
    return {
        "path": full(made.path),
        "bytes": made.bytes,
        "digest": made.digest,
        "method": made.method,
        "seconds": made.seconds,
        "scores": {name: score.record() for name, score in made.scores.items()},
        "preview": full(made.preview),
        "key": full(made.key),
    }


def erased(made: Any, concept: str, base: str) -> None:
    """How an erasure ends: scores, size, picture and the next command; the path on stdout."""
    record = erased_record(made)
    if record["scores"] and not is_quiet():
        console(sys.stderr).print(score_table(record["scores"]))
    sites = {site for edit in made.erasure.edits for site in edit.sites}
    note(
        f"{record['method']}: {size(record['bytes'])} for {len(sites)} sites"
        f" in {record['seconds']:.0f} s, seed {made.erasure.header.made[0]['seed']},"
        f" digest {record['digest'][:12]}"
    )
    if record["preview"]:
        note(f"before and after: {shown(record['preview'])}")
    if record["key"]:
        note(f"the key that restores it: {shown(record['key'])}")
    words = [concept, "--with", shown(record["path"]), "--compare"]
    words += [] if base == DEFAULT_BASE else ["--base", base]
    note(f"next: conceptzap generate {' '.join(map(quoted, words))}")
    lines([record["path"]])


def plan(record: Mapping[str, Any]) -> None:
    """What `--dry-run` found out."""
    if is_quiet():
        lines([record["output"]])
        return
    rows = [(key, flat(value)) for key, value in record.items()]
    console().print(table("", "", rows=rows, title="plan"))


def settled(record: Mapping[str, Any]) -> None:
    """The plan again, as details of a run."""
    for key, value in record.items():
        detail(f"{key}: {flat(value)}")


# generate, stack, inspect


def image_record(path: Path, picture: Any) -> dict[str, Any]:
    """What `generate --json` says of one picture."""
    return {
        "path": full(path),
        "prompt": picture.prompt,
        "seed": picture.seed,
        "erasures": [{**one, "path": full(one["path"])} for one in picture.erasures],
    }


def drawn(images: Sequence[Mapping[str, Any]], sheet: Path | None) -> None:
    """Paths of pictures as results; which erasures fired as notes."""
    lines([image["path"] for image in images] + ([full(sheet)] if sheet else []))
    for image in images:
        acted = [shown(one["path"]) for one in image["erasures"] if one["fired"]]
        by = f"changed by {', '.join(acted)}" if acted else "as the base draws it"
        detail(f"{shown(image['path'])}: seed {image['seed']}, {by}")
    silent = sum(not any(e["fired"] for e in image["erasures"]) for image in images)
    if silent and images[0]["erasures"]:
        note(f"{silent} of {len(images)} pictures: no erasure had anything to do")


def stack_record(made: Any) -> dict[str, Any]:
    """What `stack --json` says."""
    return {
        "path": full(made.path),
        "bytes": made.bytes,
        "digest": made.digest,
        "concepts": list(made.header.concepts),
        "parents": list(made.header.parents),
    }


def stacked(record: Mapping[str, Any]) -> None:
    """The stack's path; what is in it as a note."""
    concepts = ", ".join(record["concepts"])
    note(f"{concepts}: {size(record['bytes'])}, digest {record['digest'][:12]}")
    lines([record["path"]])


def info_record(info: Any) -> dict[str, Any]:
    """What `inspect --json` says of one file."""
    head = info.header
    return {
        "path": full(info.path),
        "bytes": info.bytes,
        "digest": info.digest,
        "title": head.title,
        "concepts": list(head.concepts),
        "anchors": list(head.anchors),
        "base": head.base.record(),
        "method": " + ".join(dict.fromkeys(str(made.get("method", "?")) for made in head.made)),
        "edits": [dict(edit) for edit in info.edits],
        "gates": dict(info.gates),
        "scores": dict(head.scores),
        "parents": list(head.parents),
        "made": list(head.made),
        "canary": sorted(head.canary),
        "extra": dict(head.extra),
    }


def info(record: Mapping[str, Any]) -> None:
    """One file for people: concepts, base, method, edits, scores."""
    if is_quiet():
        lines([record["digest"]])
        return
    out = console()
    out.print(table("", "", rows=_facts(record), title=record["title"]))
    rows = [_edit_row(edit) for edit in record["edits"]]
    out.print(table("op", "role", ">scale", "gates", "tensors", "sites", rows=rows))
    if record["scores"]:
        out.print(score_table(record["scores"]))


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = zip(record["concepts"], record["anchors"], strict=True)
    base = record["base"]
    revision = f"@{base['revision']}" if base["revision"] else ""
    facts = [
        ("file", record["path"]),
        ("size", size(record["bytes"])),
        ("digest", record["digest"]),
        ("erases", ", ".join(f"{concept} -> {anchor or '(empty)'}" for concept, anchor in pairs)),
        ("base", f"{base['family']}: {base['id']}{revision}"),
        ("method", record["method"]),
        *((key, flat(value)) for made in record["made"] for key, value in _short(made).items()),
        ("parents", ", ".join(parent[:12] for parent in record["parents"])),
        *((key, flat(value)) for key, value in record["extra"].items()),
    ]
    return [(key, value) for key, value in facts if value]


def _short(made: Mapping[str, Any]) -> dict[str, Any]:
    """How an erasure was made, without what is said elsewhere or takes pages."""
    words = {key: value for key, value in made.items() if key not in ("method", "keep")}
    return words | ({"keep": f"{len(made['keep'])} words"} if made.get("keep") else {})


def _edit_row(edit: Mapping[str, Any]) -> tuple[str, ...]:
    tensors = ", ".join(
        f"{slot} {'x'.join(map(str, about['shape']))} {about['dtype']}"
        for slot, about in edit["slots"].items()
    )
    gates = ", ".join(edit["gates"]) or "always"
    return edit["op"], edit["role"], f"{edit['scale']:g}", gates, tensors, site_list(edit["sites"])


def site_list(names: Sequence[str]) -> str:
    """`7 of attn2.to_k, 7 of attn2.to_v`: module paths by what they end in."""
    counts: dict[str, int] = {}
    for name in names:
        _, inside, tail = name.rpartition(".transformer_blocks.")
        kind = tail.partition(".")[2] if inside else name
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{n} of {kind}" if n > 1 else kind for kind, n in sorted(counts.items()))


# what there is


def methods(found: Sequence[Mapping[str, Any]]) -> None:
    if is_quiet():
        lines(one["name"] for one in found)
        return
    rows = [(m["name"], m["paper"], m["summary"]) for m in found]
    console().print(table("method", "paper", "what it does", rows=rows))
    note("settings of one: conceptzap methods NAME")


def method(found: Mapping[str, Any]) -> None:
    if is_quiet():
        lines(one["name"] for one in found["settings"])
        return
    title = f"{found['name']}: {found['summary']} ({found['paper'] or 'no paper'})"
    rows = [(s["name"], s["type"], s["default"], s["note"]) for s in found["settings"]]
    console().print(table("--set", "type", "default", "", rows=rows, title=title))


def presets(found: Sequence[Mapping[str, Any]]) -> None:
    if is_quiet():
        lines(one["name"] for one in found)
        return
    rows = [(p["name"], p["summary"], p["anchor"], p["keep"]) for p in found]
    console().print(table("preset", "for", "anchor", ">keep words", rows=rows))
    note("all of one: conceptzap presets NAME")


def preset(name: str, found: Mapping[str, Any]) -> None:
    """A preset as the TOML values it consists of; word lists are too long for a table."""
    lines([f"{name}: {found.get('summary', '')}"])
    lines(f"{key} = {flat(value)}" for key, value in found.items() if key != "summary")


def doctor(found: Mapping[str, Any], problems: Sequence[str], freed: int | None) -> None:
    """The report to paste; what is wrong at its end."""
    demo, cache = found["demo"], found["cache"]
    rows = [
        ("conceptzap", found["conceptzap"]),
        ("python", f"{found['python']} on {found['platform']}"),
        *found["packages"].items(),
        ("devices", f"{', '.join(found['devices'])}; {found['cores']} cores"),
        *((name, _gpu(about)) for name, about in found["gpus"].items()),
        ("demo", f"{size(demo['bytes'])} in {demo['path']}" if demo["present"] else "missing"),
        ("cache", f"{size(sum(cache['bytes'].values()))} in {cache['path']}"),
        *((f"  {kind}", size(count)) for kind, count in cache["bytes"].items()),
        ("disk free", size(found["disk_free"])),
        ("offline", "yes" if found["offline"] else "no"),
        *((f"  {name}", size(count)) for name, count in found["downloaded"].items()),
    ]
    console().print(table("", "", rows=rows, title="doctor"))
    if freed is not None:
        note(f"cleared: {size(freed)}")
    for problem in problems:
        warn(problem)


def _gpu(about: Mapping[str, Any]) -> str:
    return f"{about['name']}, {size(about['free'])} of {size(about['bytes'])} free"
