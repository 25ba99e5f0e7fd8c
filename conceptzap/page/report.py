"""The one-page report: figures with intervals, before and after, bars, confusion, attention, digests.

One file: pictures are inline, nothing is fetched (the page itself forbids it), no script runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from conceptzap.evaluation.comparison import Sample
from conceptzap.evaluation.phrases import SLICES, figure, headlines
from conceptzap.evaluation.run import Evaluation
from conceptzap.page import figures
from conceptzap.page.figures import text
from conceptzap.page.samples import Strip
from conceptzap.page.style import CSS
from conceptzap.result import Result, Score
from conceptzap.runtime import attention

CARDS = ("E", "P", "H", "Leak@1", "Leak@20", "validity", "drift", "identical")
ATTENDED = 4  # prompts whose attention is shown
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
INTERVALS = (
    "95 %: bootstrap over prompts, over concepts first where there are several;"
    " Wilson for plain rates and wherever nothing varied"
)


def html(done: Evaluation, strips: Sequence[Strip]) -> str:
    """The whole page."""
    result = done.result
    title = _title(result)
    sections = {
        "Same seed, before and after": _grids(done, strips),
        "Concept by concept": _bars(result),
        "What the judges see":
            f'<div class="two">{figures.confusion(done.comparison)}{figures.mistakes(done.comparison)}</div>',
        "Where it attends": _attention(done, strips),
        "All figures": _figures(result),
        "How it was measured": _facts(result),
    }  # fmt: skip
    parts = (f"<h2>{heading}</h2>\n{body}" for heading, body in sections.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
        f"<style>{CSS}</style></head>\n<body><h1>{text(title)}, erased</h1>"
        f"<p>{text(_subtitle(result))}</p>\n{_verdict(result)}\n{_cards(result)}\n"
        f"{''.join(parts)}</body></html>\n"
    )


def _title(result: Result) -> str:
    """What was asked to be gone, else what the files erase."""
    files = (concept for file in result.subject["files"] for concept in file["concepts"])
    return " + ".join(result.subject["concepts"] or dict.fromkeys(files)) or "Nothing"


def _subtitle(result: Result) -> str:
    files = " + ".join(file["name"] for file in result.subject["files"]) or "the base alone"
    shares = sorted({share for share in result.subject["concepts"].values() if share})
    split = f" · {' and '.join(shares)} split" if shares else ""
    return f"{files} on {result.base['id']} · suite {result.suite}{split}"


def _verdict(result: Result) -> str:
    """In words: how often it still shows, how much of the rest is left, and every leg that fails."""
    before, after, kept = (result.score(name) for name in ("seen before", "seen after", "P"))
    said = ""
    if before and after:
        said += (
            f"Asked for it, the base shows the concept in {figure(before)} of its pictures, the erased"
            f" model in {figure(after)} (at most {figure(after, after.high)}). "
        )
    if kept:
        said += (
            f"Of what the judges recognise in the base's other pictures, {figure(kept)} is still"
            f" there (at least {figure(kept, kept.low)})."
        )
    legs = [f"<div><b>{text(leg['leg'])} fails</b>: {text(leg['why'])}</div>" for leg in result.failed]
    return (
        f'<div class="verdict{" fails" if legs else ""}"><p>{said.replace(" %", "&nbsp;%")}</p>'
        f"{''.join(legs) or '<b>No leg fails.</b>'}</div>"
    )


def _cards(result: Result) -> str:
    found = filter(None, map(result.score, CARDS))
    return '<div class="cards">' + "".join(figures.card(score, result) for score in found) + "</div>"


def _grids(done: Evaluation, strips: Sequence[Strip]) -> str:
    kinds = {name: kind for kind, name in done.comparison.targets}
    legend = (
        "<p>Each column is one prompt and one seed, drawn by both models; below it what a judge sees in"
        ' the erased picture.<span class="key"></span>the concept is still seen'
        '<span class="key lost"></span>a judge no longer sees what was asked for</p>'
    )
    return legend + "\n".join(
        figures.grid(strip, kinds, done.result.score("E" if _erases(strip) else "P", strip.slice))
        for strip in strips
    )


def _erases(strip: Strip) -> bool:
    return strip.slice.startswith("erase/")


def _bars(result: Result) -> str:
    """E by concept and slice, and every kept label's recognition beside the base's, worst first."""
    gone = [score for score in result.scores if score.metric == "E" and score.slice]
    gone.sort(key=lambda score: not score.slice.startswith("concept/"))
    kept = [
        (after, before)
        for after in result.scores
        if after.metric == "right after" and (before := result.score("right before", after.slice))
        and after.slice
    ]  # fmt: skip
    kept.sort(key=lambda pair: pair[0].value - pair[1].value)
    parts = []
    if gone:
        rows = (figures.row(_label(score), score, whole=True) for score in gone)
        parts.append(f'<h3>Erased (E)</h3><div class="wide">{"".join(rows)}</div>')
    if kept:
        rows = (figures.row(_label(after), after, before) for after, before in kept)
        about = "share of pictures in which all judges see it, and pictures; the mark is the base's"
        heading = f'<h3>Kept<span class="soft">{about}</span></h3>'
        parts.append(f'{heading}<div class="many">{"".join(rows)}</div>')
    return "".join(parts)


def _label(score: Score) -> str:
    """`concept/church` and `label/cat` by their names, a slice by its title."""
    title = SLICES.get(score.slice, "")
    return title.partition(": ")[2] or score.slice.partition("/")[2]


def _attention(done: Evaluation, strips: Sequence[Strip]) -> str:
    """Attention of the concept's words in base and erased model, and of learned rows if there are any."""
    shown = [
        (sample, before, after)
        for strip in filter(_erases, strips)
        for sample, before, after in zip(strip.samples, strip.before, strip.after, strict=True)
    ][:: max(1, sum(len(s.samples) for s in strips if _erases(s)) // ATTENDED)][:ATTENDED]
    if not shown:
        return "<p>Nothing was asked for that names an erased concept.</p>"
    words = "<p>Cross-attention while each picture was drawn, mean over layers, heads and steps. Every map"
    words += " is bright where it is largest; below it the part's share of all attention.</p>"
    heads = ("", "base", "its words", "erased", "its words", "learned tokens")
    top = "".join(f"<td>{head}</td>" for head in heads)
    rows = "".join(_attended(done, *one) for one in shown)
    return f'{words}<div class="grid"><table><tr>{top}</tr>{rows}</table></div>'


def _attended(done: Evaluation, sample: Sample, before: np.ndarray, after: np.ndarray) -> str:
    probe, base, settings = sample.probe, done.bare.base, done.bare.settings
    words = [probe.concept, probe.concept.lower(), *done.words.get(probe.concept, ())]
    bare, erased = (
        attention.predict(base, probe.prompt, words, probe.seed, settings, edits)
        for edits in ((), done.erased.edits)
    )
    cells = (
        text(probe.prompt),
        figures.picture(before, f"base: {probe.prompt}"),
        _map(bare, "concept", before),
        figures.picture(after, f"erased: {probe.prompt}"),
        _map(erased, "concept", after),
        _map(erased, "learned", after),
    )
    return "<tr>" + "".join(f"<td>{one}</td>" for one in cells) + "</tr>"


def _map(look: attention.Maps, part: str, under: np.ndarray) -> str:
    if part not in look.maps:
        return "none here"
    about = "attention of learned tokens" if part == "learned" else "attention of the concept's words"
    return f"{figures.heat(look.maps[part].numpy(), under, about)}{100 * look.shares[part]:.1f} %"


def _figures(result: Result) -> str:
    sliced = [score for score in result.scores if score.slice and "label/" not in score.slice]
    return (
        f"{figures.scores(headlines(result), result)}<details><summary>By slice and concept</summary>"
        f"{figures.scores(sliced, result)}</details>"
    )


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
        ("suite", text(f"{result.suite}, seed {result.seed}")),
        ("settings", _pairs(result.settings)),
        ("versions", _pairs(result.versions)),
        ("intervals", INTERVALS),
    ]
    return f'<div class="facts">{figures.table(("", ""), rows)}</div>'


def _pairs(settings: dict[str, Any]) -> str:
    named = (f"{key} {value if value != '' else 'none'}" for key, value in settings.items())
    return text(" · ".join(named))
