"""Results of evaluations for people and for machines: tables, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from conceptzap.errors import UsageError, escape
from conceptzap.result import Result, Score
from conceptzap.terminal import show

# in the order in which they are read; a metric that is not here stands in the report alone
HEADLINES = (
    "E", "seen before", "seen after", "P", "right before", "right after", "H", "Leak@1", "Leak@20",
    "ESR-1", "PSR-1", "ESR-3", "PSR-3", "ESR-5", "PSR-5", "UA", "IRA", "CRA", "validity",
    "diversity", "drift", "KID", "identical", "gate_false_open", "gate_false_shut",
)  # fmt: skip
PLAIN = ("drift", "KID")  # no shares, so no percentages


def read(path: Path) -> Result:
    """The result in a file; `UsageError` when there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {escape(path)}: {error.strerror}", "name a result.json") from error
    except ValueError as error:
        raise UsageError(f"{escape(path)} is no JSON", "name a result.json") from error
    try:
        return Result.from_record(record)
    except UsageError as error:
        raise UsageError(f"{escape(path)}: {error}", error.hint) from error


def figure(score: Score, value: float | None = None) -> str:
    """A score's value (or one of its limits) as it is printed: shares in percent."""
    shown = score.value if value is None else value
    return f"{shown:.3g}" if score.metric in PLAIN else f"{100 * shown:.1f} %"


def interval(score: Score) -> str:
    return f"{figure(score, score.low)} – {figure(score, score.high)}"


def oracle(result: Result, score: Score) -> str:
    """The same score of a model trained without the concept, "-" where it is not known."""
    known = result.oracle.get(name(score))
    return figure(score, known["value"]) if known else "-"


def headlines(result: Result) -> list[Score]:
    """The scores over everything, and diversity's two, in reading order."""
    overall = [s for s in result.scores if not s.slice or s.metric == "diversity"]
    others = [s for s in result.scores if s.metric.startswith("NER-")]
    return sorted((s for s in overall if s.metric in HEADLINES), key=_place) + others


def _place(score: Score) -> int:
    return HEADLINES.index(score.metric)


def name(score: Score) -> str:
    return f"{score.metric} [{score.slice}]" if score.slice else score.metric


def evaluated(result: Result, written: Mapping[str, Path], as_json: bool) -> None:
    """How `evaluate` ends: the scores, what failed, where the report is."""
    paths = {key: show.full(path) for key, path in written.items()}
    if as_json:
        scores = {name(score): score.record() for score in result.scores}
        failed = [dict(leg) for leg in result.failed]
        show.emit("evaluate", {**paths, "scores": scores, "failed": failed})
        return
    if show.is_quiet():
        show.lines([paths["result"]])
        return
    heads = ["score", ">value", ">95 %", ">n", *([">never knew it"] if result.oracle else [])]
    rows = [
        (name(s), figure(s), interval(s), s.n, *([oracle(result, s)] if result.oracle else []))
        for s in headlines(result)
    ]
    show.console().print(show.table(*heads, rows=rows, title=_title(result)))
    for leg in result.failed:
        show.warn(f"{leg['leg']} fails: {leg['why']}")
    show.note(f"report: {paths['report']}")


def _title(result: Result) -> str:
    concepts = ", ".join(
        f"{concept} ({share})" if share else concept
        for concept, share in result.subject["concepts"].items()
    )
    return f"{concepts or 'no concept'} · suite {result.suite} · base {result.base['id']}"


def compared(paths: Sequence[Path], results: Sequence[Result], as_json: bool) -> None:
    """Results side by side, one column each."""
    titles = [_subject(result) for result in results]
    if as_json:
        columns = [
            {
                "path": show.full(path),
                "subject": result.subject,
                "scores": {name(score): score.record() for score in result.scores},
                "failed": list(result.failed),
            }
            for path, result in zip(paths, results, strict=True)
        ]
        show.emit("compare", {"results": columns})
        return
    if show.is_quiet():
        show.lines(map(show.full, paths))
        return
    keys = dict.fromkeys((s.metric, s.slice) for result in results for s in headlines(result))
    rows = [
        (_key(*key), *(_cell(result.score(*key)) for result in results)) for key in keys
    ]
    failed = [("fails", *(", ".join(leg["leg"] for leg in r.failed) or "-" for r in results))]
    show.console().print(show.table("score", *(f">{title}" for title in titles), rows=rows + failed))


def _key(metric: str, slice: str) -> str:
    return f"{metric} [{slice}]" if slice else metric


def _cell(score: Score | None) -> str:
    return f"{figure(score)} ({interval(score)})" if score else "-"


def _subject(result: Result) -> str:
    return " + ".join(
        file["name"] if file["strength"] == 1 else f"{file['name']}:{file['strength']:g}"
        for file in result.subject["files"]
    )
