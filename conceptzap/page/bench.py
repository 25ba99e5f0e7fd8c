"""The files of a bench: `bench.json` (the same for the same request), `bench.csv`, `bench.md`, and the page.

The page has, for each suite, a scatter of E against P, the means of every method, and all cells; then a
table of every method under every attack, and a section for each attack with what came through.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from markupsafe import Markup

from conceptzap.evaluation import phrases
from conceptzap.evaluation.matrix import Bench, Cell, Job
from conceptzap.format import atomic
from conceptzap.page import attack, folder, report
from conceptzap.result import Score

NAMES = {"json": "bench.json", "csv": "bench.csv", "table": "bench.md", "page": "bench.html"}
ATTACKS = "attacks"  # the folder of the attacks' own pages
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SIDE, MARGIN = 360, 44  # of the scatter, in its own units
TURN = 137.5  # degrees of hue from one method to the next: neighbours never look alike
TICKS = 5


def write(done: Bench, place: Path) -> dict[str, Path]:
    """Write all of them; `bench.json` last."""
    record = json.dumps(done.record(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    texts = {"csv": _csv(done), "table": markdown(done), "page": html(done, place), "json": record}
    for name, text in texts.items():
        atomic.write_atomic(place / NAMES[name], text.encode(), force=True)
    return {"folder": place, **{key: place / name for key, name in NAMES.items()}}


def markdown(done: Bench) -> str:
    """The tables of methods and of cells, for a README."""
    environment = report.templates().overlay(autoescape=False)
    made: dict[tuple[str, str], list[Cell]] = {}
    for cell in (cell for cell in done.cells if cell.file):
        made.setdefault((cell.suite, cell.job.method), []).append(cell)
    text = environment.get_template("bench.md.j2").render(
        done=done, means=list(done.means()), heads=_heads(done), figure=_figure, attacked=_attacked(done),
        costs={key: _costs(cells) for key, cells in made.items()},
    )
    return text.strip() + "\n"


def _costs(cells: list[Cell]) -> tuple[float, float, float]:
    """Mean seconds, kB and peak MB."""
    costs = ((cell.seconds, cell.bytes / 1e3, cell.peak_bytes / 1e6) for cell in cells)
    seconds, size, memory = map(mean, zip(*costs, strict=True))
    return seconds, size, memory


def _heads(done: Bench) -> dict[tuple[str, str], str]:
    """Metric and slice -> its name, of all that some suite's cell has."""
    shown = [key for key in done.figures if any(c.score(*key) for c in done.cells if not c.attack)]
    return {key: phrases.name(Score(key[0], 0, 0, 0, 0, slice=key[1])) for key in shown}


def html(done: Bench, place: Path | None = None) -> str:
    """The whole page; it fetches nothing and runs nothing. In `place` lie the attacks' own pages."""
    environment = report.templates()
    colours = {name: f"hsl({TURN * i % 360:.0f} 65% 50%)" for i, name in enumerate(done.matrix.methods)}
    return environment.get_template("bench.html.j2").render(
        policy=POLICY,
        style=Markup(environment.loader.get_source(environment, "style.css")[0]),
        done=done,
        colours=colours,
        scatters=[scatter(done, suite) for suite in done.matrix.suites],
        means=list(done.means()),
        heads=_heads(done),
        attacked=_attacked(done),
        attacks=ATTACKS,
        through={cell.name: _through(place, cell) for cell in done.cells if cell.attack and cell.result},
        side=SIDE,
        margin=MARGIN,
        figure=_figure,
    )


def _attacked(done: Bench) -> dict[tuple[Job, str], Cell]:
    return {(cell.job, cell.attack): cell for cell in done.cells if cell.attack}


def _through(place: Path | None, cell: Cell) -> str:
    """What came through in a cell, as a data URI; "" where nothing did."""
    path = (place or Path()) / ATTACKS / cell.name / attack.IMAGES / attack.THROUGH
    if place is None or not path.is_file():
        return ""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# the scatter


@dataclass(frozen=True)
class Dot:
    """A cell at (E, P) in the scatter's units, with the ends of both intervals."""

    cell: Cell
    x: float
    y: float
    wide: tuple[float, float]
    high: tuple[float, float]


@dataclass(frozen=True)
class Scatter:
    """The dots of a suite; the axes begin at `low`, a share. `ticks`: share and place on the x axis."""

    suite: str
    dots: tuple[Dot, ...]
    ticks: tuple[tuple[float, float], ...]


def scatter(done: Bench, suite: str) -> Scatter:
    """E to the right and P upwards, both from the same round share to 1, so that the best is top right."""
    cells = [cell for cell in done.cells if cell.suite == suite]
    pairs = [(cell, e, p) for cell in cells if (e := cell.score("E")) and (p := cell.score("P"))]
    least = min((min(e.value, p.value) for _, e, p in pairs), default=0.0)
    low = min(0.8, max(0.0, math.floor(10 * least - 0.5) / 10))

    def at(share: float) -> float:
        return round(SIDE * max(0.0, share - low) / (1 - low), 1)

    def down(share: float) -> float:
        return SIDE - at(share)

    dots = tuple(
        Dot(cell, at(e.value), down(p.value), (at(e.low), at(e.high)), (down(p.high), down(p.low)))
        for cell, e, p in pairs
    )
    shares = [low + (1 - low) * step / TICKS for step in range(TICKS + 1)]
    return Scatter(suite, dots, tuple((share, at(share)) for share in shares))


# words and numbers


def _figure(key: tuple[str, str], value: float) -> str:
    return phrases.figure(Score(key[0], value, value, value, 0, slice=key[1]))


def _csv(done: Bench) -> str:
    keys = [phrases.key(*key) for key in done.figures]
    heads = [f"{key}{part}" for key in keys for part in ("", " low", " high", " n")]
    asked = ["method", "concept", "anchor", "suite"]
    costs = ["bytes", "seconds", "peak bytes", "digest", "error"]
    return folder.rows([[*asked, *heads, *costs], *(_row(done, cell) for cell in done.cells)])


def _row(done: Bench, cell: Cell) -> list[Any]:
    job, error = cell.job, cell.error["message"] if cell.error else ""
    scores = [part for key in done.figures for part in _parts(cell.score(*key))]
    costs = [cell.bytes, cell.seconds, cell.peak_bytes, cell.digest, error]
    return [job.method, job.concept, job.anchor, cell.suite, *scores, *costs]


def _parts(score: Score | None) -> Iterator[Any]:
    values = (score.value, score.low, score.high, score.n) if score else ("",) * 4
    yield from values
