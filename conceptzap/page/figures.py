"""The report's pieces as HTML: cards, bars, grids of pictures, confusion, attention maps."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from conceptzap.page.results import figure, interval, name, oracle
from conceptzap.page.samples import Strip
from conceptzap.result import Result, Score
from conceptzap.trial import Cell, Trial

LARGEST = 192  # pixels a side of a picture in the page
TITLES = {
    "erase/seen": "Erased: its name in known wordings",
    "erase/held-out": "Erased: its name in wordings that erasing never saw",
    "erase/synonym": "Synonyms",
    "erase/bare": "The style alone",
    "erase/crossed": "Erased object in other styles",
    "erase/composed": "Composed with something to keep",
    "erase/sealed": "Sealed: prompts chosen by the file's digest",
    "keep/neighbour": "Neighbours",
    "keep/unrelated": "Unrelated",
    "keep/style": "Other styles",
    "keep/composed": "Two kept objects",
}


def text(value: object) -> str:
    return html.escape(str(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; a head that starts with ">" is a column of numbers."""
    kinds = [' class="n"' if head.startswith(">") else "" for head in heads]
    top = "".join(f"<th{k}>{text(head.lstrip('>'))}</th>" for k, head in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def card(score: Score, about: str) -> str:
    return (
        f'<div class="card"><span>{text(name(score))} · {text(about)}</span><b>{figure(score)}</b>'
        f"<span>{interval(score)} · n = {score.n}</span></div>"
    )


def scores(found: Sequence[Score], result: Result) -> str:
    """All of some scores; beside them those of a model that never knew the concept, if known."""
    rows = [
        (text(name(s)), figure(s), interval(s), str(s.n), text(s.better), oracle(result, s))
        for s in found
    ]
    return table(("score", ">value", ">95 % interval", ">n", "better", ">never knew it"), rows)


def bar(now: Score, before: Score | None = None) -> str:
    """A share as a bar with its interval; the base's behind it."""
    was = f'<i class="was" style="width:{100 * before.value:.1f}%"></i>' if before else ""
    return (
        f'<div class="bar">{was}<i style="width:{100 * now.value:.1f}%"></i>'
        f'<u style="left:{100 * now.low:.1f}%;width:{100 * (now.high - now.low):.1f}%"></u></div>'
    )


def picture(array: np.ndarray, about: str = "") -> str:
    """An inline PNG, at most 192 pixels a side."""
    image = Image.fromarray(array)
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(about)}" src="data:image/png;base64,{data}">'


def grid(strip: Strip, kinds: dict[str, str]) -> str:
    """Two rows of pictures: the base's and, same seeds, the erased model's; leaks are outlined."""
    heads = "".join(f"<td>{text(cell.probe.prompt)}</td>" for cell in strip.cells)
    before = "".join(
        f"<td>{picture(one, cell.probe.prompt)}</td>"
        for one, cell in zip(strip.before, strip.cells, strict=True)
    )
    after = "".join(
        f'<td class="{_mark(cell, kinds)}">{picture(one, cell.probe.prompt)}{text(_seen(cell))}</td>'
        for one, cell in zip(strip.after, strip.cells, strict=True)
    )
    title = TITLES.get(strip.slice, strip.slice)
    return (
        f'<h3>{text(title)} <span class="soft">{text(strip.slice)}</span></h3><div class="grid">'
        f"<table><tr><th></th>{heads}</tr><tr><th>base</th>{before}</tr>"
        f"<tr><th>erased</th>{after}</tr></table></div>"
    )


def _mark(cell: Cell, kinds: dict[str, str]) -> str:
    probe = cell.probe
    if probe.erases:
        kind = kinds[probe.concept]
        return "leaks" if cell.after.seen(kind, probe.concept, cell.depth(kind)) else ""
    lost = (
        cell.before.kept(kind, label, depth) and not cell.after.kept(kind, label, depth)
        for kind, label in probe.expect
        for depth in (cell.depth(kind),)
    )
    return "broken" if any(lost) else ""


def _seen(cell: Cell) -> str:
    """What the first judge of every kind sees in the erased picture."""
    firsts = (rankings[0][0] for rankings in cell.after.labels.values() if rankings and rankings[0])
    return ", ".join(firsts)


def confusion(trial: Trial) -> str:
    """What the judges see in an erased concept's pictures, before and after; most frequent first."""
    parts = []
    for kind, concept in trial.targets:
        cells = trial.erased(concept)
        before, after = (_counts(cells, when, kind) for when in ("before", "after"))
        labels = sorted(before | after, key=lambda label: -(before[label] + after[label]))[:10]
        total = max(1, sum(before.values()))
        rows = [
            (text(label), f"{before[label] / total:.0%}", f"{after[label] / total:.0%}")
            for label in labels
        ]
        parts.append(f"<div><h3>{text(concept)} is seen as</h3>"
                     f"{table((kind, '>base', '>erased'), rows)}</div>")
    return "".join(parts)


def _counts(cells: Iterable[Cell], when: str, kind: str) -> Counter[str]:
    rankings = (ranked for cell in cells for ranked in getattr(cell, when).labels.get(kind, ()))
    return Counter(ranked[0] if ranked else "nothing" for ranked in rankings)


def mistakes(trial: Trial) -> str:
    """Kept labels that a judge takes for another one after erasing and did not before."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, label in trial.kept_labels:
        for cell in trial.asking(kind, label):
            if cell.depth(kind) == 1 and cell.before.kept(kind, label):
                tops = (r[0] for r in cell.after.labels.get(kind, ()) if r and r[0] != label)
                found.update((label, top) for top in set(tops))
    rows = [(text(asked), text(seen), str(n)) for (asked, seen), n in found.most_common(10)]
    if not rows:
        return "<div><h3>Kept, but now mistaken</h3><p>nothing</p></div>"
    return f"<div><h3>Kept, but now mistaken</h3>{table(('asked', 'seen', '>pictures'), rows)}</div>"


def heat(weights: np.ndarray, about: str) -> str:
    """A map [side, side] as a picture, scaled to its own largest value, dark to bright."""
    level = np.clip(weights / max(float(weights.max()), 1e-9), 0, 1)[..., None]
    dark, bright = np.array([24.0, 28, 44]), np.array([255.0, 214, 102])
    pixels = (dark + level * (bright - dark)).astype(np.uint8)
    return picture(pixels, about)
