"""The one-page report: figures with intervals, before and after, bars, confusion, attention, digests.

One file: pictures are inline, nothing is fetched, no script runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from conceptzap import attention
from conceptzap.evaluation import Evaluation
from conceptzap.page import figures
from conceptzap.page.figures import text
from conceptzap.page.results import figure, headlines
from conceptzap.page.samples import Strip
from conceptzap.page.style import CSS
from conceptzap.result import Result, Score
from conceptzap.trial import Cell

CARDS = {
    "E": "concept gone",
    "P": "rest recognised",
    "H": "both together",
    "Leak@1": "shows in one try",
    "Leak@20": "shows in twenty tries",
    "validity": "are pictures",
    "drift": "1 = another seed",
    "identical": "bit for bit the base's",
}
ATTENDED = 4  # prompts whose attention is shown


def html(done: Evaluation, strips: Sequence[Strip]) -> str:
    """The whole page."""
    result = done.result
    title = ", ".join(result.subject["concepts"]) or "no concept"
    body = "\n".join(
        (
            f"<h1>{text(title)}, erased</h1><p>{text(_subtitle(result))}</p>",
            _verdict(result),
            _cards(result),
            "<h2>Same seed, before and after</h2><p>Red: the concept is still seen. Dashed: a judge no"
            " longer sees what was asked.</p>",
            *(figures.grid(strip, _kinds(done)) for strip in strips),
            "<h2>Concept by concept</h2>",
            _bars(result),
            "<h2>What the judges see</h2>",
            f'<div class="two">{figures.confusion(done.trial)}{figures.mistakes(done.trial)}</div>',
            "<h2>Where it attends</h2>",
            _attention(done, strips),
            "<h2>All figures</h2>",
            figures.scores(headlines(result), result),
            "<details><summary>by slice</summary>",
            figures.scores(_sliced(result), result),
            "</details><h2>How it was measured</h2>",
            _facts(result),
        )
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}'
    top = f"<!doctype html>\n<html lang=en><head>{head}</title><style>{CSS}</style></head>"
    return f"{top}\n<body>{body}</body></html>\n"


def _sliced(result: Result) -> list[Score]:
    return [score for score in result.scores if score.slice and "label/" not in score.slice]


def _kinds(done: Evaluation) -> dict[str, str]:
    return {name: kind for kind, name in done.trial.targets}


def _subtitle(result: Result) -> str:
    files = " + ".join(file["name"] for file in result.subject["files"]) or "the base alone"
    shares = sorted({share for share in result.subject["concepts"].values() if share})
    split = f" · concepts of the {' and '.join(shares)} split" if shares else ""
    return f"{files} on {result.base['id']} · suite {result.suite}{split}"


def _verdict(result: Result) -> str:
    if not result.failed:
        return '<div class="fails stands">No leg fails.</div>'
    legs = "".join(f"<div><b>{text(leg['leg'])}</b> {text(leg['why'])}</div>" for leg in result.failed)
    return f'<div class="fails">{legs}</div>'


def _cards(result: Result) -> str:
    found = ((result.score(metric), about) for metric, about in CARDS.items())
    return '<div class="cards">' + "".join(figures.card(s, a) for s, a in found if s) + "</div>"


def _bars(result: Result) -> str:
    """E by concept and slice, and every kept label's recognition over the base's."""
    rows = [
        (text(score.slice.partition("/")[2]), figures.bar(score), figure(score), str(score.n))
        for score in result.scores
        if score.metric == "E" and score.slice
    ]
    kept = [
        (text(score.slice.partition("/")[2]), figures.bar(score, before), figure(score), str(score.n))
        for score in result.scores
        if score.metric == "right after" and score.slice
        and (before := result.score("right before", score.slice))
    ]
    gone = figures.table(("erased", "", ">E", ">n"), rows)
    stays = figures.table(("kept (grey: base)", "", ">right", ">n"), kept)
    return f'<div class="two"><div>{gone}</div><div>{stays}</div></div>'


def _attention(done: Evaluation, strips: Sequence[Strip]) -> str:
    """Attention of the concept's words in base and erased model, and of learned rows if there are any."""
    cells = [cell for strip in strips for cell in strip.cells if cell.probe.erases][:ATTENDED]
    rows = list(_maps(done, cells))
    if not rows:
        return "<p>Nothing was asked for that names an erased concept.</p>"
    heads = ("prompt", "base: its words", "erased: its words", "erased: learned tokens")
    return f'<div class="grid">{figures.table(heads, rows)}</div>'


def _maps(done: Evaluation, cells: Sequence[Cell]) -> Iterator[tuple[str, ...]]:
    base, edits = done.bare.base, done.erased.edits
    for cell in cells:
        probe = cell.probe
        words = [probe.concept, probe.concept.lower(), *done.words.get(probe.concept, ())]
        looks = [
            attention.look(base, probe.prompt, words, probe.seed, done.bare.settings, acting)
            for acting in ((), edits)
        ]
        wanted = ((looks[0], "concept"), (looks[1], "concept"), (looks[1], "learned"))
        shown = (
            f"{figures.heat(look.maps[part].numpy(), part)}{look.shares[part]:.1%} of all attention"
            if part in look.maps
            else "-"
            for look, part in wanted
        )
        yield (text(probe.prompt), *shown)


def _facts(result: Result) -> str:
    files = [
        (text(file["name"]), f"<code>{file['digest']}</code> at strength {file['strength']:g}")
        for file in result.subject["files"]
    ]
    judges = [(text(f"judge {j['name']}"), f"<code>{text(j['digest'])}</code>") for j in result.judges]
    rows = [
        *files,
        (text(f"base {result.base['id']}"), f"<code>{result.base['digest']}</code>"),
        ("prompts and seeds", f"<code>{result.probes}</code>"),
        *judges,
        ("settings", text(json.dumps(result.settings))),
        ("suite, seed", text(f"{result.suite}, {result.seed}")),
        ("versions", text(json.dumps(result.versions))),
        ("intervals", "95 %: bootstrap over prompts, over concepts first where there are several;"
                      " Wilson for plain rates and wherever nothing varied"),
    ]
    return figures.table(("", ""), rows)
