"""A batch in which no gate can open is the base's, and is not drawn twice; to measure that, it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edits import ASKED, OTHER, gate, shut, sight, tokens

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.evaluation.cached import CachedSampler, ImageBatch
from conceptzap.evaluation.observing import identical
from conceptzap.report import Report
from conceptzap.result import Probe, Settings

LOOK = Settings(steps=2, batch=4)


@pytest.fixture
def drawn(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[str]]]:
    """Every batch that is drawn: whether under edits, and its prompts."""
    found: list[tuple[bool, list[str]]] = []
    draw = CachedSampler._draw

    def drawing(self: CachedSampler, probes: tuple[Probe, ...]) -> ImageBatch:
        found.append((bool(self.edits), [probe.prompt for probe in probes]))
        return draw(self, probes)

    monkeypatch.setattr(CachedSampler, "_draw", drawing)
    return found


def asked(*prompts: str) -> tuple[Probe, ...]:
    return tuple(Probe("some", prompt, seed, "") for seed, prompt in enumerate(prompts))


def behind(base: Base, *gates: object) -> Edit:
    return replace(tokens(base), gates=gates)


def test_what_stays_shut_is_drawn_once_by_the_base(sd1: Base, drawn: list) -> None:
    edits, probes = [behind(sd1, gate(sd1))], asked(*OTHER[1:])
    bare = CachedSampler(sd1, LOOK).batch(probes)
    skipped = CachedSampler(sd1, LOOK, edits).batch(probes)
    assert drawn == [(False, list(OTHER[1:]))]
    made = CachedSampler(sd1, LOOK, edits, anew=True).batch(probes)
    assert drawn[1:] == [(True, list(OTHER[1:]))]
    for one in (skipped, made):
        assert np.array_equal(one.pictures, bare.pictures)
        assert not any(one.fired)


@pytest.mark.parametrize(
    ("gated", "prompts", "negative"),
    [
        pytest.param(lambda base: (gate(base),), (OTHER[1], ASKED[1]), "", id="one of the batch opens"),
        pytest.param(lambda base: (gate(base),), (OTHER[1],), ASKED[1], id="the negative prompt opens"),
        pytest.param(lambda base: (), (OTHER[1],), "", id="no gate"),
        pytest.param(lambda base: (shut(),), (OTHER[1],), "", id="a gate of times alone"),
        pytest.param(lambda base: (sight(base),), (OTHER[1],), "", id="a gate that looks"),
    ],
)
def test_whatever_may_be_acted_on_is_drawn(
    sd1: Base, drawn: list, gated: object, prompts: tuple[str, ...], negative: str
) -> None:
    sampler = CachedSampler(sd1, replace(LOOK, negative=negative), [behind(sd1, *gated(sd1))])
    sampler.batch(asked(*prompts))
    assert drawn == [(True, list(prompts))]


def test_an_edit_without_a_gate_beside_one_with_a_gate(sd1: Base, drawn: list) -> None:
    CachedSampler(sd1, LOOK, [behind(sd1, gate(sd1)), tokens(sd1, seed=1)]).batch(asked(OTHER[1]))
    assert drawn == [(True, [OTHER[1]])]


def test_identity_is_measured_not_assumed(sd1: Base, drawn: list) -> None:
    bare, erased = (CachedSampler(sd1, LOOK, edits) for edits in ((), [behind(sd1, gate(sd1))]))
    assert identical(bare, erased, asked(*OTHER[1:3]), 2, Report()) == (True, True)
    assert [under for under, _ in drawn] == [False, True, False, True]
