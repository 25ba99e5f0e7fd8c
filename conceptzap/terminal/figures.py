"""How `evaluate`, `compare` and `bench` end: a sentence, then tables; or one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conceptzap.evaluation import phrases, verdict
from conceptzap.evaluation.matrix import Bench, Cell
from conceptzap.result import Result, Score
from conceptzap.terminal import show


def evaluated(result: Result, written: Mapping[str, Path], as_json: bool) -> None:
    """What it comes to in a sentence, the scores, what failed, where the report is."""
    paths = {key: show.full(path) for key, path in written.items()}
    said = verdict.sentence(result)
    if as_json:
        show.emit("evaluate", {**paths, "status": verdict.status(result), "verdict": said, **_record(result)})
        return
    if show.is_quiet():
        show.lines([paths["result"]])
        return
    show.lines([f"{said}."])
    everything = show.wants_detail()
    chosen = phrases.headlines(result, phrases.HEADLINES if everything else phrases.FIRST)
    heads = ["score", ">value", ">95 %", ">n", *([">never knew it"] if result.oracle else [])]
    rows = [_row(result, score) for score in chosen]
    show.console().print(show.table(*heads, rows=rows, title=_title(result)))
    for failed in result.failed:
        show.warn(f"{failed['leg']} fails: {failed['why']}")
    if not everything:
        show.note("benchmark metrics (ESR, PSR, UA, IRA, CRA, KID): -v, or the report")
    show.note(f"report: {paths['report']}")


def _record(result: Result) -> dict[str, Any]:
    return {
        "scores": {phrases.key(s.metric, s.slice): s.record() for s in result.scores},
        "failed": [dict(failed) for failed in result.failed],
    }


def _row(result: Result, score: Score) -> tuple[object, ...]:
    beside = [phrases.oracle(result, score)] if result.oracle else []
    return (phrases.name(score), phrases.figure(score), phrases.interval(score), score.n, *beside)


def _title(result: Result) -> str:
    shares = result.subject["concepts"].items()
    concepts = ", ".join(f"{name} ({share})" if share else name for name, share in shares)
    return f"{concepts or 'no concept'} · suite {result.suite} · base {result.base['id']}"


def attacked(done: Any, as_json: bool) -> None:
    """A sentence, then the rates of every form; or one JSON object."""
    paths = {key: show.full(path) for key, path in done.written.items()}
    if as_json:
        show.emit("attack", {**paths, **done.record(), "verdict": done.sentence()})
        return
    if show.is_quiet():
        show.lines([paths["result"]])
        return
    show.lines([f"{done.sentence()}."])
    rows = [("base, with nothing erased", _share(done.base), "", "", done.base.n, "")]
    rows += [("before, unattacked", _share(done.before), "", "", done.before.n, "")]
    for form in done.listed:
        worst = "worst" if done.about.get("only") else "ASR"
        mark = f"{form.name} ({worst})" if form.name == done.worst.name else form.name
        counts = (form.newly.n, form.pictures)
        rows.append((mark, _share(form.after), _share(form.newly), form.shut or "", *counts))
    if done.oracle:
        worst, pictures = done.oracle.worst, done.oracle.worst.pictures
        mark = f"a model that never knew it, {worst.name}"
        rows.append((mark, _share(worst.after), _share(worst.newly), "", worst.newly.n, pictures))
    heads = ("attack", ">shown", ">of those safe before", ">edits shut", ">n", ">pictures")
    about = done.about
    only = f" · {', '.join(about['only'])} alone" if about.get("only") else ""
    what = f"{about['attack']} · {about['budget']}{only}"
    title = f"{what} · base {about['base']['id']} · {done.seconds:.0f} s"
    show.console().print(show.table(*heads, rows=rows, title=title))
    if asked := [f"{form.name} {_share(form.meant)}" for form in done.listed if form.meant]:
        show.note(f"so often the base shows it by these words, with nothing erased: {', '.join(asked)}")
    back = done.recoverability
    told = f"recovered, of what the base draws and the erased model did not: {_share(back)}, n = {back.n}"
    if done.oracle:
        told += f"; by a model that never knew it: {_share(done.oracle.recoverability)}"
    show.note(told)
    worst = done.worst
    show.note(f"what classifiers saw under {worst.name}, by prompts of {worst.newly.n}: {done.beside}")
    show.note(f"report: {paths.get('report', '')}")


def _share(score: Score) -> str:
    return f"{score.value:.0%} ({score.low:.0%} to {score.high:.0%})" if score.n else "-"


def compared(paths: Mapping[str, Path], results: Mapping[str, Result], as_json: bool) -> None:
    """Results side by side, one column each, under the names that tell them apart."""
    if as_json:
        columns = [
            {"path": show.full(paths[name]), "name": name, "subject": result.subject, **_record(result)}
            for name, result in results.items()
        ]
        show.emit("compare", {"results": columns})
        return
    if show.is_quiet():
        show.lines(map(show.full, paths.values()))
        return
    found = [score for result in results.values() for score in phrases.headlines(result)]
    rows = {
        phrases.name(score): [_cell(one.score(score.metric, score.slice)) for one in results.values()]
        for score in found
    }
    status = ["", *(verdict.status(result) or "-" for result in results.values())]
    fails = [", ".join(one["leg"] for one in result.failed) or "-" for result in results.values()]
    table = [status, *((name, *cells) for name, cells in rows.items()), ("fails", *fails)]
    show.console().print(show.table("score", *(f">{name}" for name in results), rows=table))


def _cell(score: Score | None) -> str:
    return f"{phrases.figure(score)} ({phrases.interval(score)})" if score else "-"


def benched(done: Bench, as_json: bool, error: Mapping[str, Any] | None) -> None:
    """How `bench` ends: its cells in a table, what failed, where the page is."""
    paths = {key: show.full(path) for key, path in done.written.items()}
    if as_json:
        cells = [_cell_record(done, cell) for cell in done.cells]
        show.emit("bench", {**paths, "cells": cells, **({"error": dict(error)} if error else {})})
        return
    if show.is_quiet():
        show.lines([paths["json"]])
        return
    heads = [phrases.name(Score(metric, 0, 0, 0, 0, slice=slice)) for metric, slice in done.figures]
    rows = [
        (cell.job.method, cell.job.concept, cell.suite, *(_cell(cell.score(*key)) for key in done.figures),
         f"{cell.seconds:.1f}", show.size(cell.bytes))
        for cell in done.cells if cell.result
    ]  # fmt: skip
    numbers = [f">{head}" for head in (*heads, "seconds", "file")]
    show.console().print(show.table("method", "concept", "suite", *numbers, rows=rows))
    for cell in done.failed:
        show.warn(f"{cell.name}: {cell.error['message']}; {cell.error['hint']}")
    show.note(f"page: {paths['page']}")


def _cell_record(done: Bench, cell: Cell) -> dict[str, Any]:
    scores = cell.result.scores if cell.result else ()
    return {
        "method": cell.job.method, "concept": cell.job.concept, "anchor": cell.job.anchor,
        "suite": cell.suite, "path": show.full(done.written["folder"] / cell.file) if cell.file else None,
        "bytes": cell.bytes, "digest": cell.digest, **cell.costs(), "error": cell.error,
        "scores": {phrases.key(s.metric, s.slice): s.record() for s in scores},
    }  # fmt: skip
