"""The one-page report: a verdict, figures with intervals, before and after, what judges see, digests.

One file that fetches nothing (the page itself forbids it): pictures, style and the one small script
are inline, and the script is the only one that the page lets run. Every text is escaped by the
templates in `templates/`.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from conceptzap.evaluation import phrases, verdict
from conceptzap.evaluation.run import Evaluation
from conceptzap.page import figures, strength
from conceptzap.page.samples import Pair, Strip
from conceptzap.report import Report
from conceptzap.result import Result, Score
from conceptzap.runtime import attention

CARDS = ("E", "P", "H", "Leak@1", "Leak@20", "validity", "drift", "identical")
ATTENDED = 4  # prompts whose attention is shown
FEW = 12  # kept labels that are shown at once, worst first
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
INTERVALS = (
    "95 %: bootstrap over prompts, over concepts first where there are several;"
    " Wilson for plain rates and wherever nothing varied"
)


def html(done: Evaluation, strips: Sequence[Strip], report: Report) -> str:
    """The whole page. `report` is shown the progress of what is drawn for it."""
    result = done.result
    script = _source("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates().get_template("report.html.j2").render(
        policy=POLICY.format(digest),
        style=Markup(_source("style.css")),
        script=Markup(script),
        done=done,
        result=result,
        title=verdict.title(result),
        status=verdict.status(result),
        sentence=verdict.sentence(result),
        shares=sorted({share for share in result.subject["concepts"].values() if share}),
        cards=[score for score in map(result.score, CARDS) if score],
        strips=strips,
        fadings=strength.fadings(done, strips, report),
        strengths=strength.STRENGTHS,
        gone=_gone(result),
        kept=_kept(result),
        confusions=figures.confusions(done.comparison),
        mistakes=figures.mistakes(done.comparison),
        attended=list(_attended(done, strips, report)),
        headlines=phrases.headlines(result),
        sliced=[score for score in result.scores if score.slice and "label/" not in score.slice],
        intervals=INTERVALS,
        few=FEW,
    )


@cache
def templates() -> jinja2.Environment:
    """The templates of all pages, whose every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("conceptzap.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "phrases": phrases, "figures": figures, "command": _command, "grid_score": _grid_score,
    }  # fmt: skip
    environment.filters |= {"percent": _percent, "label": _label, "pairs": _pairs}
    return environment


def _source(name: str) -> str:
    """A file beside the templates as it is."""
    environment = templates()
    return environment.loader.get_source(environment, name)[0]


def _percent(share: float) -> str:
    """A share as a CSS length."""
    return f"{100 * share:.1f}%"


def _label(score: Score) -> str:
    """`concept/church` and `label/cat` by their names, a slice by its title."""
    title = phrases.SLICES.get(score.slice, "")
    return title.partition(": ")[2] or score.slice.partition("/")[2]


def _command(done: Evaluation, pair: Pair) -> str:
    """The command line that draws a pair again, base and erased side by side."""
    probe = pair.sample.probe
    prompt = [probe.prompt] if not probe.prompt.startswith("-") else ["--", probe.prompt]
    words = ["conceptzap", "generate", *done.request, "--seed", str(probe.seed), "--compare"]
    return shlex.join([*words, *prompt])


def _grid_score(result: Result, strip: Strip) -> Score | None:
    return result.score("E" if strip.erases else "P", strip.slice)


def _gone(result: Result) -> list[Score]:
    """E by concept, then by slice."""
    gone = [score for score in result.scores if score.metric == "E" and score.slice]
    return sorted(gone, key=lambda score: not score.slice.startswith("concept/"))


def _kept(result: Result) -> list[tuple[Score, Score]]:
    """Every kept label's recognition after and before, worst first."""
    kept = [
        (after, before)
        for after in result.scores
        if after.metric == "right after" and (before := result.score("right before", after.slice))
        and after.slice
    ]  # fmt: skip
    return sorted(kept, key=lambda pair: pair[0].value - pair[1].value)


def _attended(
    done: Evaluation, strips: Sequence[Strip], report: Report
) -> Iterator[tuple[Pair, list[tuple[str, figures.Shown, float] | None]]]:
    """Attention of the concept's words in base and erased model, and of learned rows if there are any.

    For each pair three maps (what it is of, the map, its share of all attention), None where the
    prompt or the erasure has no such tokens.
    """
    shown = [pair for strip in strips if strip.erases for pair in strip.pairs]
    shown = shown[:: max(1, len(shown) // ATTENDED)][:ATTENDED]
    batch = done.bare.settings.batch
    chunks = [shown[start : start + batch] for start in range(0, len(shown), batch)]
    for chunk in report.count(chunks, len(chunks), "looking at attention"):
        yield from _attended_together(done, chunk)


def _attended_together(
    done: Evaluation, shown: Sequence[Pair]
) -> Iterator[tuple[Pair, list[tuple[str, figures.Shown, float] | None]]]:
    probes = [pair.sample.probe for pair in shown]
    words = [[p.concept, p.concept.lower(), *done.words.get(p.concept, ())] for p in probes]
    asked = [probe.prompt for probe in probes], words, [probe.seed for probe in probes]
    looks = (
        attention.look(done.bare.base, *asked, done.bare.settings, edits) for edits in ((), done.erased.edits)
    )
    for pair, bare, erased in zip(shown, *looks, strict=True):
        wanted = (bare, "concept", pair.before), (erased, "concept", pair.after)
        yield pair, [_map(*one) for one in (*wanted, (erased, "learned", pair.after))]


def _map(
    look: attention.Maps, part: str, under: np.ndarray
) -> tuple[str, figures.Shown, float] | None:
    if part not in look.maps:
        return None
    about = "attention of learned tokens" if part == "learned" else "attention of the concept's words"
    return about, figures.heat(look.maps[part].numpy(), under), look.shares[part]


def _pairs(settings: dict[str, Any]) -> str:
    return " · ".join(f"{key} {value if value != '' else 'none'}" for key, value in settings.items())
