"""The report's pieces as HTML: cards, bars, grids of pictures, confusion, attention maps."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from conceptzap.evaluation.comparison import Comparison, Sample
from conceptzap.evaluation.phrases import PLAIN, SLICES, about, figure, interval, name, oracle
from conceptzap.page.samples import SHOWN, Strip
from conceptzap.page.style import PICTURE
from conceptzap.result import Result, Score

LARGEST = 192  # pixels a side of a picture in the page
RAMP = np.array([[18, 16, 54], [128, 38, 110], [240, 110, 80], [255, 232, 158]], float)
VEIL = 0.62  # how much of an attention map covers its picture


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
    return f"<table>{f'<tr>{top}</tr>' if any(heads) else ''}{body}</table>"


def card(score: Score, result: Result) -> str:
    """A headline: what it is, its value, its interval on a scale, what a model without it scores."""
    known = oracle(result, score)
    never = f"<span>a model that never knew it: {known}</span>" if known != "-" else ""
    return (
        f'<div class="card"><div>{text(name(score))} · {text(about(score.metric))}</div>'
        f"<b>{figure(score)}</b>{'' if score.metric in PLAIN else _range(score)}"
        f"<span>95 %: {interval(score)} · n = {score.n}</span>{never}</div>"
    )


def _range(score: Score) -> str:
    """The interval on the whole scale, the value as a mark."""
    return (
        f'<div class="range"><i style="{_span(score)}"></i>'
        f'<u style="left:{_percent(score.value)}"></u></div>'
    )


def bar(now: Score, before: Score | None = None) -> str:
    """A share as a bar, its interval as a line in it, the base's share as a mark."""
    was = f'<s style="left:{_percent(before.value)}"></s>' if before else ""
    share = f'<i style="width:{_percent(now.value)}"></i>'
    return f'<div class="bar">{share}<u style="{_span(now)}"></u>{was}</div>'


def _span(score: Score) -> str:
    return f"left:{_percent(score.low)};width:{_percent(score.high - score.low)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def row(label: str, now: Score, before: Score | None = None, whole: bool = False) -> str:
    """A label, its bar, its figure; `whole`: with the interval in numbers."""
    beside = f"{interval(now)} · {now.n}" if whole else str(now.n)
    return (
        f'<div class="row"><span>{text(label)}</span>{bar(now, before)}'
        f'<span>{figure(now)} <span class="soft">{beside}</span></span></div>'
    )


def scores(found: Sequence[Score], result: Result) -> str:
    """All of some scores; beside them those of a model that never knew the concept, if known."""
    beside = [">never knew it"] if result.oracle else []
    rows = [
        (
            text(name(s)), "↑" if s.better == "higher" else "↓", figure(s), interval(s), str(s.n),
            *([oracle(result, s)] if beside else []),
            f'<span class="soft">{text(about(s.metric))}</span>',
        )
        for s in found
    ]  # fmt: skip
    return table(("score", "better", ">value", ">95 % interval", ">n", *beside, ""), rows)


def picture(array: np.ndarray, alt: str = "") -> str:
    """An inline PNG, at most 192 pixels a side; small ones keep sharp pixels when enlarged."""
    image = Image.fromarray(array)
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    sharp = ' class="px"' if max(image.size) <= PICTURE else ""
    return f'<img{sharp} alt="{text(alt)}" src="data:image/png;base64,{data}">'


def grid(strip: Strip, kinds: dict[str, str], score: Score | None) -> str:
    """Two rows of pictures: the base's and, same seeds, the erased model's; leaks are outlined.

    `score`: that of the slice, for the heading.
    """
    empty = "<td></td>" * (SHOWN - len(strip.samples))
    heads = "".join(f"<td>{text(sample.probe.prompt)}</td>" for sample in strip.samples)
    before = "".join(
        f"<td>{picture(one, sample.probe.prompt)}</td>"
        for one, sample in zip(strip.before, strip.samples, strict=True)
    )
    after = "".join(
        f'<td class="{_mark(sample, kinds)}">{picture(one, sample.probe.prompt)}{text(_seen(sample))}</td>'
        for one, sample in zip(strip.after, strip.samples, strict=True)
    )
    found = f"{score.metric} {figure(score)} ({interval(score)}), n = {score.n}" if score else ""
    return (
        f'<h3>{text(SLICES.get(strip.slice, strip.slice))}<span class="soft">{text(found)}</span></h3>'
        f'<div class="grid"><table><tr><th></th>{heads}{empty}</tr>'
        f"<tr><th>base</th>{before}</tr><tr><th>erased</th>{after}</tr></table></div>"
    )


def _mark(sample: Sample, kinds: dict[str, str]) -> str:
    probe = sample.probe
    if probe.erases:
        kind = kinds[probe.concept]
        return "leaks" if sample.after.seen(kind, probe.concept, sample.depth(kind)) else ""
    lost = (
        sample.before.kept(kind, label, depth) and not sample.after.kept(kind, label, depth)
        for kind, label in probe.expect
        for depth in (sample.depth(kind),)
    )
    return "broken" if any(lost) else ""


def _seen(sample: Sample) -> str:
    """What the first judge of every kind sees in the erased picture."""
    firsts = (rankings[0][0] for rankings in sample.after.labels.values() if rankings and rankings[0])
    return ", ".join(firsts)


def confusion(comparison: Comparison) -> str:
    """What the judges see in an erased concept's pictures, before and after; most frequent first."""
    parts = []
    for kind, concept in comparison.targets:
        samples = comparison.erased(concept)
        before, after = (_counts(samples, when, kind) for when in ("before", "after"))
        labels = sorted(before | after, key=lambda label: -(before[label] + after[label]))[:10]
        total = max(1, sum(before.values()))
        rows = [
            (text(label), *_share(before[label] / total), *_share(after[label] / total))
            for label in labels
        ]
        heads = (kind, "base's pictures", ">", "erased model's", ">")
        parts.append(f"<div><h3>{text(concept)} is seen as</h3>{table(heads, rows)}</div>")
    return "".join(parts)


def _share(value: float) -> tuple[str, str]:
    return f'<div class="bar"><i style="width:{_percent(value)}"></i></div>', f"{100 * value:.0f} %"


def _counts(samples: Iterable[Sample], when: str, kind: str) -> Counter[str]:
    rankings = (ranked for sample in samples for ranked in getattr(sample, when).labels.get(kind, ()))
    return Counter(ranked[0] if ranked else "nothing" for ranked in rankings)


def mistakes(comparison: Comparison) -> str:
    """Kept labels that a judge takes for another one after erasing and did not before."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, label in comparison.kept_labels:
        for sample in comparison.asking(kind, label):
            if sample.depth(kind) == 1 and sample.before.kept(kind, label):
                tops = (r[0] for r in sample.after.labels.get(kind, ()) if r and r[0] != label)
                found.update((label, top) for top in set(tops))
    rows = [(text(asked), text(seen), str(n)) for (asked, seen), n in found.most_common(10)]
    shown = table(("asked", "now seen", ">pictures"), rows) if rows else "<p>Nothing.</p>"
    return f"<div><h3>Kept, but now mistaken for something else</h3>{shown}</div>"


def heat(weights: np.ndarray, under: np.ndarray, alt: str) -> str:
    """A map [side, side], dark to bright over its own range, laid over a picture [h, w, 3] in grey."""
    size = (PICTURE, PICTURE)
    low, high = float(weights.min()), float(weights.max())
    level = (weights - low) / max(high - low, 1e-9)
    smooth = Image.fromarray((255 * level).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    stops = np.linspace(0, 255, len(RAMP))
    colours = np.stack([np.interp(np.asarray(smooth), stops, channel) for channel in RAMP.T], -1)
    grey = np.asarray(Image.fromarray(under).convert("L").resize(size), float)[..., None]
    return picture((VEIL * colours + (1 - VEIL) * grey).astype(np.uint8), alt)
