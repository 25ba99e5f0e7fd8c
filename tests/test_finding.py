"""What hardening searches for: tokens, and states that no tokens have."""

from __future__ import annotations

from dataclasses import replace

import edits as some
import pytest
import torch

from conceptzap.base import CROSS_KV, Base
from conceptzap.edit import Edit
from conceptzap.redteam import finding
from conceptzap.redteam.case import (
    ALONE,
    AROUND,
    BEFORE,
    DERIVED,
    INSTEAD,
    SHIFTED,
    Budget,
    Case,
    Known,
    Search,
)
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import lessons, probe

TASK = Task(("van gogh",), ("painting",), ("monet", "cat"), ("style",))
SMALL = Budget(concept=4, others=8, styled=4, erased=2, mixed=3, batch=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks at each picture."""
    monkeypatch.setattr(probe, "LOOKED", 2)
    monkeypatch.setattr(probe, "FOLDS", 2)


@pytest.mark.parametrize("place", [INSTEAD, BEFORE, ALONE, AROUND])
def test_a_search_lowers_what_it_is_after(sd1: Base, place: str) -> None:
    """From the same tokens: nearer to what the base draws for the name, with the gates further shut."""
    lesson = next(iter(lessons.lessons(sd1, TASK)))
    prompts = lesson.prompts[:4]
    seen = probe.watch(sd1, prompts, 0, Report(), "looking")
    known = Known(seen, seen.rows([0]), probe.watch(sd1, lesson.kept(8), 10, Report(), "looking"), 2, ())

    def searched(steps: int) -> float:
        size, search = replace(SMALL, steps=steps, batch=4), Search(2, 0.1, place, lr=0.05)
        case = Case(sd1, sd1, lesson, (), size, Report())
        cond = finding.find(case, known, search, prompts, 0).cond
        assert len(cond.states.unique(dim=0)) == len(prompts)  # each its own, even where tokens stand alone
        x, t = seen.latents[0], int(seen.times[0])
        with torch.no_grad(), probe.looking(sd1) as looks:
            error = (sd1.predict(x, t, cond) - sd1.predict(x, t, sd1.encode(prompts))).pow(2).mean()
        pairs = torch.cat([looks[0], seen.without[0]], -1)
        margin = finding.sight.scores(known.gate, pairs, seen.times[:1].expand(4))
        return float(error + search.evade * finding._shutting([margin]))

    assert searched(12) < searched(0)


def test_states_near_the_concepts_stay_near(sd1: Base) -> None:
    """In each number no farther than `REACH` times the anchor's, root mean square, whatever the search is after."""
    lesson = next(iter(lessons.lessons(sd1, TASK)))
    prompts = lesson.prompts[:4]
    seen = probe.watch(sd1, prompts, 0, Report(), "looking")
    known = Known(seen, seen.rows([0]), probe.watch(sd1, lesson.kept(8), 10, Report(), "looking"), 2, ())
    case = Case(sd1, sd1, lesson, (), replace(SMALL, steps=3, batch=4), Report())
    found = finding.find(case, known, Search(0, 1.0, AROUND, lr=99.0), prompts, 0).cond.states
    concept, anchor = (sd1.encode(texts).states for texts in (prompts, lesson.anchors[:4]))
    bound = finding.REACH * (concept - anchor).pow(2).mean().sqrt()
    assert torch.isclose((found - concept).abs().max(), bound)


def test_ring_a_bells_states_lie_along_the_concept(sd1: Base) -> None:
    lesson = next(iter(lessons.lessons(sd1, TASK)))
    case = Case(sd1, sd1, lesson, (), SMALL, Report())
    found = finding.find(case, None, Search(0, place=SHIFTED), lesson.prompts[:2], 0).cond.states  # type: ignore[arg-type]
    with_it, without_it = (sd1.encode(texts).states for texts in (lesson.prompts, lesson.anchors))
    for row, eta in zip(found - without_it[:2], finding.ALONG, strict=True):
        assert torch.allclose(row, eta * (with_it - without_it).mean(0), atol=1e-4)


def test_reces_states_undo_what_the_weights_do(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edited projections make of them what the base's make of the concept; without such edits, nothing."""
    lesson = next(iter(lessons.lessons(sd1, TASK)))
    half = Edit("weight", sd1.sites(CROSS_KV), {"keep": torch.full((some.width(sd1),), 0.5)})
    case = Case(sd1, sd1, lesson, (half,), SMALL, Report())
    monkeypatch.setattr(finding, "RESTORING", 1e-6)
    found = finding.find(case, None, Search(0, place=DERIVED), lesson.prompts[:2], 0).cond.states  # type: ignore[arg-type]
    assert torch.allclose(found, 2 * sd1.encode(lesson.prompts[:2]).states, rtol=1e-2, atol=1e-2)
    assert finding.applies(case, Search(0, place=DERIVED))
    assert not finding.applies(replace(case, edits=()), Search(0, place=DERIVED))
