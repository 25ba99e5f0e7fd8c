"""The page and the means of `bench`, of made-up figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_bench import Tags

from conceptzap.evaluation import matrix
from conceptzap.evaluation.matrix import Bench, Cell, Job
from conceptzap.result import Result, Score


def cells(*values: tuple[str, float, float]) -> Bench:
    """A bench of made-up figures: method, E, P of one concept each."""
    made = []
    for method, e, p in values:
        scores = (Score("E", e, e - 0.1, e + 0.1, 9), Score("P", p, p, p, 9), Score("ASR-x", 0.5, 0, 1, 9))
        blank: dict[str, Any] = dict.fromkeys(("subject", "base", "settings"), {})
        result = Result(**blank, suite="s", seed=0, judges=[], probes="", scores=scores)
        made.append(Cell(Job(method, "cat"), "s", result=result))
    names = tuple(dict.fromkeys(method for method, _, _ in values))
    return Bench(matrix.Matrix(names, ("cat",), ("s",)), tuple(made))


def test_an_attack_has_a_section_with_what_came_through(tmp_path: Path) -> None:
    """And a table in bench.md: rates with what was shown before, a dash where nothing was measured."""
    from conceptzap.page import attack
    from conceptzap.page import bench as page

    rate = Score("ASR", 0.5, 0.2, 0.8, 16), Score("ASR before", 0.0, 0.0, 0.2, 16)
    blank: dict[str, Any] = dict.fromkeys(("subject", "base", "settings"), {})
    result = Result(**blank, suite="s", seed=0, judges=[], probes="", scores=rate)
    jobs = [Job("a", "cat"), Job("b", "cat")]
    made = tuple(Cell(job, f"{matrix.ATTACK}seeds", result=result) for job in jobs)
    done = Bench(matrix.Matrix(("a", "b"), ("cat",), (), attacks=("seeds", "p4d")), made)
    images = tmp_path / page.ATTACKS / made[0].name / attack.IMAGES
    images.mkdir(parents=True)
    (images / attack.THROUGH).write_bytes(b"png")
    pictures = [attrs for tag, attrs in Tags(page.html(done, tmp_path)).tags if tag == "img"]
    assert [one["src"] for one in pictures] == ["data:image/png;base64,cG5n"] and all(one["alt"] for one in pictures)
    assert "nothing came through" in page.html(done, tmp_path)
    table = page.markdown(done)
    assert "| method | concept | seeds | p4d | n |" in table
    assert "| `b` | cat | 50.0 % (0.0 %) [20.0 to 80.0 %] | - | 16 |" in table, table


def test_the_scatter_begins_below_the_worst_and_the_best_is_top_right() -> None:
    from conceptzap.page import bench as page

    plot = page.scatter(cells(("a", 1.0, 1.0), ("b", 0.62, 0.8)), "s")
    best, worst = plot.dots
    assert (best.x, best.y) == (page.SIDE, 0) and 0 < worst.x < worst.wide[1] and worst.high[0] == worst.y
    assert plot.ticks[0] == (0.5, 0) and plot.ticks[-1] == (1.0, page.SIDE)
    assert page.scatter(cells(("a", 0.0, 0.0)), "s").ticks[0] == (0.0, 0)
    assert page.scatter(cells(), "s").dots == ()


def test_means_are_over_concepts_with_the_worst_and_robust_figures_join_them() -> None:
    done = cells(("a", 1.0, 0.8), ("a", 0.6, 0.9))
    assert done.figures == (("E", ""), ("P", ""), ("ASR-x", ""))
    ((suite, method, found, count),) = done.means()
    assert (suite, method, count) == ("s", "a", 2)
    assert found["E", ""] == pytest.approx((0.8, 0.6)) and found["P", ""] == pytest.approx((0.85, 0.8))


def test_a_name_is_shown_as_it_is() -> None:
    from conceptzap.page import bench as page

    shown = page.html(Bench(matrix.Matrix(("<b>",), ("<script>",), ("s",)), (Cell(Job("<b>", "<i>"), "s"),)))
    assert "<script>" not in shown and "&lt;i&gt;" in shown
