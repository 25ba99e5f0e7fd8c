"""How a run over a list of concepts is told: its plans, its table, what failed, the stack of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conceptzap.terminal import show

if TYPE_CHECKING:
    from conceptzap.verbs.many import ErasedAll, ErasedOne


def plans(record: Mapping[str, Any]) -> None:
    """What `--dry-run` found out: a line a concept, and all that they do not share."""
    if show.is_quiet():
        show.lines([plan["output"] for plan in record["plans"]] + [record["output"]])
        return
    rows = [
        (plan["concepts"][0], _anchor(plan["anchors"][0]), plan["kinds"][0], plan["method"],
         _keeps(plan["keep"]), plan["seed"], _seconds(plan["estimate"]))
        for plan in record["plans"]
    ]  # fmt: skip
    heads = ("concept", "becomes", "kind", "method", ">keeps", ">seed", ">alone about")
    count = f"{len(rows)} concepts on {record['plans'][0]['base']}"
    show.console().print(show.table(*heads, rows=rows, title=count))
    settings = {plan["method"]: _settings(plan["config"]) for plan in record["plans"]}  # a row changes none
    show.console().print(show.table("method", "settings", rows=settings.items()))
    show.note(f"a file each in {show.shown(record['folder'])}, the stack: {show.shown(record['output'])}")


def _anchor(anchor: str | None) -> str:
    return "what is nearest" if anchor is None else anchor or show.NOTHING


def _keeps(words: Sequence[str]) -> str:
    return f"{len(words)} words" if words else "the usual"


def _seconds(estimate: Mapping[str, Any] | None) -> str:
    return f"{estimate['seconds']:.0f} s" if estimate else "not known"


def _settings(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in config.items())


def record(done: ErasedAll) -> dict[str, Any]:
    """What `erase --from --json` says."""
    return {
        "files": [_file(one) for one in done.files],
        "failed": [{"concept": one.concept, **one.error, "command": one.command} for one in done.failed],
        "stack": show.stack_record(done.stack) if done.stack else None,
        "scores": {name: score.record() for name, score in done.scores.items()},
        "seconds": done.seconds,
    }


def _file(one: ErasedOne) -> dict[str, Any]:
    shown, pictures = one.left or (None, None)
    return {
        "concept": one.concept, "anchor": one.anchor, "kind": one.kind, "method": one.method,
        "path": show.full(one.path), "bytes": one.bytes, "digest": one.digest, "seconds": one.seconds,
        "kept": one.kept, "failed": bool(one.error), "shown": shown, "pictures": pictures,
    }  # fmt: skip


def told(done: ErasedAll) -> None:
    """A line a concept; what failed with the command that repeats it; the stack, as the result."""
    rows = [
        (one.concept, one.anchor or show.NOTHING, one.method, show.size(one.bytes) if one.bytes else "-",
         "kept" if one.kept else f"{one.seconds:.1f} s", one.digest[:12] or "-", _fate(one))
        for one in done.files
    ]  # fmt: skip
    heads = ("concept", "becomes", "method", ">file", ">made in", "digest", "in the stack")
    if not show.is_quiet():
        show.console().print(show.table(*heads, rows=rows))
    for one in done.failed:
        show.warn(f"{one.concept}: {one.error['message']}; repeat it alone: {one.command}")
    if done.verdict:
        show.note(done.verdict)
    count = sum(not one.kept for one in done.files)
    show.note(f"{count} made, {len(done.files) - count} kept, {done.seconds:.0f} s")
    if done.stack:
        show.stacked(show.stack_record(done.stack))


def _fate(one: ErasedOne) -> str:
    if one.error:
        return "failed"
    if one.left is None:
        return "not measured"
    shown, pictures = one.left
    return f"gone from {pictures - shown} of {pictures}"
