"""Everything that is printed: results to stdout, notes and hints to stderr.

Names that come from files go through `errors.escape` and into `rich` as text, never as markup.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conceptzap.terminal import inline
from conceptzap.terminal.listing import (
    flat,
    full,
    quoted,
    score_table,
    shown,
    size,
    table,
)
from conceptzap.terminal.speech import (
    ask,
    begin,
    console,
    detail,
    emit,
    is_quiet,
    lines,
    moving,
    note,
    one_line,
    settle,
    wants_detail,
    wants_progress,
    warn,
)
from conceptzap.words import with_article

__all__ = [
    "ask", "attack", "attacks", "begin", "console", "detail", "doctor", "drawn", "emit", "erased",
    "erased_record", "flat", "full", "image_record", "info", "info_record", "is_quiet", "lines",
    "method", "methods", "moving", "note", "one_line", "plan", "preset", "presets", "quoted",
    "score_table", "settle", "settled", "shown", "site_list", "size", "stack_record", "stacked",
    "table", "wants_detail", "wants_progress", "warn",
]  # fmt: skip
DEFAULT_BASE = "demo"
NOTHING = "nothing (the empty prompt)"
# what a gate opens for, by its kind
OPENS = {
    "match": "prompts about it", "similar": "prompts near it", "token": "its words",
    "window": "some steps", "curve": "some steps", "sight": "pictures of it",
}  # fmt: skip
LAYER = re.compile(r"\.encoder\.layers\.\d+\.")  # of a text encoder
EFFECTS = {"erase": "erases", "key": "restores", "attack": "attacks"}

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
    """How an erasure ends: what became of it, its cost, the picture and the next command; its path."""
    record = erased_record(made)
    told = {"verdict": "", "prompt": "", "peak_bytes": 0, "phases": {}, **vars(made)}
    if told["verdict"]:
        note(told["verdict"])
    layers = {site for edit in made.erasure.edits for site in edit.sites}
    memory = f", at most {size(told['peak_bytes'])} of memory" if told["peak_bytes"] else ""
    note(
        f"{record['method']}: {size(record['bytes'])} for {len(layers)} layers"
        f" in {record['seconds']:.0f} s{memory}, seed {made.erasure.header.made[0]['seed']},"
        f" digest {record['digest'][:12]}"
    )
    for phase, seconds in told["phases"].items():
        detail(f"{phase}: {seconds:.1f} s")
    if record["scores"] and not is_quiet():
        console(sys.stderr).print(score_table(record["scores"]))
    if record["preview"]:
        note(f"before and after: {shown(record['preview'])}")
        inline.show(record["preview"])
    if record["key"]:
        note(f"the key that restores it: {shown(record['key'])}")
    words = [told["prompt"] or concept, "--with", shown(record["path"]), "--compare"]
    words += [] if base == DEFAULT_BASE else ["--base", base]
    note(f"next: conceptzap generate {' '.join(map(quoted, words))}")
    lines([record["path"]])


def plan(record: Mapping[str, Any]) -> None:
    """What `--dry-run` found out."""
    if is_quiet():
        lines([record["output"]])
        return
    rows = [(key, text) for key, value in _planned(record).items() if (text := flat(value))]
    console().print(table("", "", rows=rows, title="plan"))


def _planned(record: Mapping[str, Any]) -> dict[str, Any]:
    """The plan in words: each concept with its kind and what it becomes; settings a line each."""
    told = dict(record)
    told["cost"] = _cost(told.pop("estimate"), told["method"])
    triples = zip(*(told.pop(key) for key in ("concepts", "anchors", "kinds")), strict=True)
    settings = told.pop("config")
    erases = {f"erases {concept!r}": _becomes(anchor, kind) for concept, anchor, kind in triples}
    keep = told.pop("keep")
    kept = {"keeps": f"{len(keep)} words: {flat(keep)}"} if keep else {}
    return {**erases, **kept, **told, **{f"--set {key}": value for key, value in settings.items()}}


def _cost(estimate: Mapping[str, Any] | None, method: str) -> str:
    if not estimate:
        return f"not known before a first {method} on this base has ended here"
    like = "these settings" if estimate["same"] else "other settings"
    spent = f"{estimate['seconds']:.0f} s, {size(estimate['peak_bytes'])} of memory"
    return f"about {spent}, a file of {size(estimate['bytes'])}: as the last run with {like} here"


def _becomes(anchor: str | None, kind: str) -> str:
    """`a style, becomes painting`; None is settled once the base is there."""
    what = "what is nearest to it" if anchor is None else anchor or NOTHING
    return f"{with_article(kind)}, becomes {what}" if kind else f"becomes {what}"


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
    paths = [image["path"] for image in images] + ([full(sheet)] if sheet else [])
    if sheet or len(paths) == 1:
        inline.show(paths[-1])
    lines(paths)
    for image in images:
        acted = [shown(one["path"]) for one in image["erasures"] if one["fired"]]
        by = f"changed by {', '.join(acted)}" if acted else "as the original draws it"
        detail(f"{shown(image['path'])}: seed {image['seed']}, {by}")
    silent = sum(not any(e["fired"] for e in image["erasures"]) for image in images)
    if silent and images[0]["erasures"]:
        note(f"{silent} of {len(images)} pictures: nothing erased was asked for, so they are the original's")


def stack_record(made: Any) -> dict[str, Any]:
    """What `stack --json` says."""
    return {
        "path": full(made.path),
        "bytes": made.bytes,
        "digest": made.digest,
        "concepts": list(made.header.concepts),
        "parents": list(made.header.parents),
        "overlaps": made.overlaps.record(),
    }


def stacked(record: Mapping[str, Any]) -> None:
    """The stack's path; what is in it as a note."""
    concepts = flat(record["concepts"])
    everywhere = len(record["overlaps"]["everywhere"])
    if everywhere > 1:
        note(f"{everywhere} files act on every prompt, and add up there; the others only where they open")
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
    rows = [_edit_row(edit, record["gates"]) for edit in record["edits"]]
    out.print(table("op", "effect", ">strength", "acts on", "tensors", "layers", rows=rows))
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
        ("erases", ", ".join(f"{concept} -> {anchor or NOTHING}" for concept, anchor in pairs)),
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
    if isinstance(record := words.get("harden"), Mapping):
        words["harden"] = record.get("budget")
    return words | ({"keep": f"{len(made['keep'])} words"} if made.get("keep") else {})


def _edit_row(edit: Mapping[str, Any], gates: Mapping[str, Any]) -> tuple[str, ...]:
    tensors = ", ".join(
        f"{slot} {'x'.join(map(str, about['shape']))} {about['dtype']}"
        for slot, about in edit["slots"].items()
    )
    kinds = dict.fromkeys(gates[name]["kind"] for name in edit["gates"])
    reads = all(site.startswith("text.") for site in edit["sites"])
    always = "every text, as it is read" if reads else "every prompt"
    acts = ", ".join(OPENS.get(kind, kind) for kind in kinds) or always
    effect = EFFECTS.get(edit["role"], edit["role"])
    params = edit["params"]
    op = " ".join(filter(None, (edit["op"], params.get("phi"), params.get("rule"))))
    acts += f"; {params['rows']} rows" if "rows" in params else ""
    return op, effect, f"{edit['scale']:g}", acts, tensors, site_list(edit["sites"])


def site_list(names: Sequence[str]) -> str:
    """`7 of attn2.to_k, 12 of text.1.mlp.fc1`: module paths by what they end in."""
    counts: dict[str, int] = {}
    for name in names:
        _, inside, tail = name.rpartition(".transformer_blocks.")
        kind = tail.partition(".")[2] if inside else LAYER.sub(".", name)
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{n} of {kind}" if n > 1 else kind for kind, n in sorted(counts.items()))


# what there is


def methods(found: Sequence[Mapping[str, Any]]) -> None:
    if is_quiet():
        lines(one["name"] for one in found)
        return
    rows = [(m["name"] + " *" * m["default"], m["paper"], *_kind(m), m["summary"]) for m in found]
    console().print(table("method", "paper", "edits", "cost", "exports", "what it does", rows=rows))
    note("* is the default; settings of one: conceptzap methods NAME")


def _kind(found: Mapping[str, Any]) -> tuple[str, str, str]:
    return found["edits"], found["cost"], "yes" if found["exports"] else "no"


def method(found: Mapping[str, Any]) -> None:
    about = (found["paper"] or "no paper", *_kind(found)[:2], "exports" if found["exports"] else "no export")
    _settings(found, f"{found['name']}: {found['summary']} ({'; '.join(about)})")


def _settings(found: Mapping[str, Any], title: str, *more: str) -> None:
    """`more`: a heading for what a paper sets, where that is told."""
    if is_quiet():
        lines(one["name"] for one in found["settings"])
        return
    paper = [[s["paper"]] if more else [] for s in found["settings"]]
    rows = [
        (s["name"], s["type"], s["default"], *theirs, s["note"])
        for s, theirs in zip(found["settings"], paper, strict=True)
    ]
    console().print(table("--set", "type", "default", *more, "", rows=rows, title=title))


def attacks(found: Sequence[Mapping[str, Any]]) -> None:
    if is_quiet():
        lines(one["name"] for one in found)
        return
    rows = [(one["name"], one["paper"], _of_attack(one)) for one in found]
    console().print(table("attack", "paper", "what it does", rows=rows))
    note("settings of one: conceptzap attacks NAME")


def attack(found: Mapping[str, Any]) -> None:
    if not found["settings"] and not is_quiet():
        lines([f"{found['name']}: {_of_attack(found)}; it has no settings"])
        return
    title = f"{found['name']}: {_of_attack(found)} ({found['paper'] or 'no paper'})"
    _settings(found, title, "--budget paper")


def _of_attack(found: Mapping[str, Any]) -> str:
    """What it does: the first line of its file, which says itself whether it is a control."""
    return found["summary"].rstrip(".")


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
