"""What hardening looks at: mixtures, tokens that are searched for, and states that no tokens have."""

from __future__ import annotations

from dataclasses import replace

import edits as some
import pytest
import torch

from conceptzap.base import CROSS_KV, Base
from conceptzap.redteam import finding, hardening
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
from conceptzap.runtime import ops, texts
from conceptzap.task import Task
from conceptzap.training import lessons, probe
from conceptzap.training.wordings import Pair

TASK = Task(("van gogh",), ("painting",), ("monet", "cat"), ("style",))
SMALL = Budget(concept=4, others=8, styled=4, erased=2, mixed=3, batch=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks at each picture."""
    monkeypatch.setattr(probe, "LOOKED", 2)
    monkeypatch.setattr(probe, "FOLDS", 2)


def cased(base: Base) -> tuple[Case, list[str]]:
    """Van Gogh under attack, and some prompts."""
    lesson = next(iter(lessons.lessons(base, TASK)))
    return Case(base, base, lesson, (), SMALL, Report()), lesson.prompts[:4]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_around_the_concepts_stay_there(base: Base, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each number no farther than `REACH` times the anchor's, root mean square, an encoder."""
    case, prompts = cased(base)
    real = Base.encode
    monkeypatch.setattr(Base, "encode", lambda self, texts: real(self, texts).to(dtype))
    free = finding._near(case, prompts)
    concept, anchor = (real(base, texts).states for texts in (prompts, case.lesson.anchors[:4]))
    widths = [encoder.config.hidden_size for encoder in base.text_encoders]
    for bound, away in zip(free.bound.split(widths), (concept - anchor).split(widths, -1), strict=True):
        assert torch.allclose(bound, finding.REACH * away.pow(2).mean().sqrt(), rtol=1e-2)
    assert free.start.dtype == torch.float32  # or Adam's first step is none: its epsilon is 0 in halves
    assert free.spoken(free.start + 1, torch.tensor([2])).states.dtype == dtype


def test_states_go_no_farther_than_that(sd1: Base) -> None:
    case, prompts = cased(sd1)
    seen = probe.watch(sd1, prompts, 0, Report(), "looking")
    known = Known(seen, seen.rows([0]), probe.watch(sd1, case.lesson.kept(8), 10, Report(), "looking"), 2, ())
    case = replace(case, size=replace(SMALL, steps=3, batch=4))
    found = finding.find(case, known, Search(0, 1.0, AROUND, lr=99.0), prompts, 0).cond.states
    moved = found - sd1.encode(prompts).states
    assert torch.isclose(moved.abs().max(), finding._near(case, prompts).bound.max(), rtol=1e-3)


def test_ring_a_bells_states_lie_along_the_concept(base: Base) -> None:
    case, prompts = cased(base)
    found = finding.find(case, None, Search(0, place=SHIFTED), prompts[:2], 0).cond  # type: ignore[arg-type]
    with_it, without_it = (base.encode(texts) for texts in (case.lesson.prompts, case.lesson.anchors))
    for name in ("states", "pooled") if base.family == "sdxl" else ("states",):
        rows, far, near = (getattr(one, name) for one in (found, with_it, without_it))
        for row, start, eta in zip(rows, near, finding.ALONG, strict=False):
            assert torch.allclose(row, start + eta * (far - near).mean(0), atol=1e-4)


def test_reces_states_undo_what_the_weights_do(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projections that are changed for these texts make of them what the base's make of the concept."""
    case, prompts = cased(base)
    gate = some.gate(base)
    shut, wide = (replace(gate, params={**gate.params, "threshold": at}) for at in (99.0, -99.0))
    edits = [some.shared(base, seed=seed, gates=gates) for seed, gates in ((0, ()), (1, (wide,)), (2, (shut,)))]
    case = replace(case, edits=tuple(edits))
    monkeypatch.setattr(finding, "RESTORING", 1e-9)
    found = finding.find(case, None, Search(0, place=DERIVED), prompts, 0).cond.states  # type: ignore[arg-type]
    concept = base.encode(prompts).states
    for site in base.sites(CROSS_KV):
        old = base.module(site).weight
        new = old + ops.weight_delta(edits[:2], base.module(site))
        assert torch.allclose(found @ new.T, concept @ old.T, rtol=1e-2, atol=1e-2)
    assert finding.applies(case, Search(0, place=DERIVED))
    for edits in ((), edits[2:], [some.tokens(base)]):
        assert not finding.applies(replace(case, edits=tuple(edits)), Search(0, place=DERIVED))


def test_states_are_asked_of_no_text_encoder_that_was_erased(sd1: Base) -> None:
    case, _ = cased(sd1)
    erased = replace(case, acting=texts.baked(sd1, [some.in_text(sd1)])[0])
    for place in (AROUND, SHIFTED, BEFORE):
        assert finding.applies(case, Search(0, place=place))
        assert finding.applies(erased, Search(0, place=place)) == (place == BEFORE)


def test_what_takes_no_search_comes_once() -> None:
    size = replace(SMALL, turns=3, searches=(Search(1), Search(0, place=SHIFTED), Search(4), Search(0, place=DERIVED)))
    assert [one.place == INSTEAD for one in size.order] == [True, False, True, False, *[True] * 4]
    assert size.digest != replace(size, turns=2).digest
    assert replace(SMALL, turns=0).digest == replace(SMALL, turns=0, searches=()).digest


def test_a_mixture_is_between_the_concept_and_others_of_its_kind(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word with each share in turn, in the concept's place in the prompt."""
    lesson = replace(next(iter(lessons.lessons(sd1, TASK))), pairs=(Pair("a van gogh", "a painting"),))
    monkeypatch.setattr(lessons, "alike", lambda *_: ["monet", "hokusai"])
    case = Case(sd1, sd1, lesson, (), replace(SMALL, mixed=7), Report())
    found = hardening._mixed(case, ["a van gogh"])
    assert len(found) == 7
    concept = sd1.encode(["a van gogh"]).states
    for at, word in enumerate(["a painting"] * 3 + ["a monet"] * 3 + ["a hokusai"]):
        share = hardening.SHARES[at % 3]
        wanted = share * concept + (1 - share) * sd1.encode([word]).states
        assert torch.allclose(found.states[at], wanted[0], atol=1e-5)
