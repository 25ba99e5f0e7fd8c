"""AGE: the target is a mixture of the concept's neighbours in its own prompts."""

from __future__ import annotations

import pytest
import torch
from small import edits, lesson, settings

from conceptzap.base import Base
from conceptzap.methods import age
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training import objectives


@pytest.fixture
def choice(sd1: Base) -> age.Choice:
    cfg = config.resolve(age.Config, settings("age", trajectories=3, candidates=4))
    return age.Choice.of(sd1, lesson(sd1), cfg, Report(seed=0))


def test_neighbours_are_neither_the_concept_nor_its_anchor_nor_unknown(sd1: Base) -> None:
    found = age.words(sd1, lesson(sd1), 4)
    assert found and not {"cat", "dog", "kitty"} & set(found)
    assert not any(sd1.unknown_words(word) for word in found)


def test_the_target_is_the_mixture_of_one_wording(sd1: Base, choice: age.Choice) -> None:
    k = len(choice.logits)
    choice.logits.data[1] = 50.0
    told = lesson(sd1)
    pairs = [pair for pair in told.pairs if told.concept in pair.concept]
    chosen = objectives.subset(0, pairs, 3)
    name = age.words(sd1, told, 4)[0]
    rows = choice.draw(torch.Generator().manual_seed(0), 5, 0, 1)
    swapped = sd1.encode([pair.concept.replace("cat", name) for pair in chosen]).states
    asked = sd1.encode([pair.concept for pair in chosen]).states
    for concept, target in zip(rows.concept.states, rows.anchor.states, strict=True):
        wording = [torch.allclose(concept, one, atol=1e-5) for one in asked].index(True)
        assert torch.allclose(target, swapped[wording], atol=1e-5)
    assert len(choice.cond) == 3 * k


def test_gradients_reach_the_choice(choice: age.Choice) -> None:
    rows = choice.draw(torch.Generator().manual_seed(0), 2, 0, 1)
    (gradient,) = torch.autograd.grad(rows.anchor.states.pow(2).sum(), choice.logits)
    assert gradient.abs().sum() > 0


def test_halves_of_a_batch_are_its_rows(choice: age.Choice) -> None:
    whole, *parts = (
        choice.draw(torch.Generator().manual_seed(1), 5, part, n) for part, n in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.equal(whole.x, torch.cat([part.x for part in parts]))
    assert sum(part.share for part in parts) == pytest.approx(1)


def test_it_trains_low_rank_weights(sd1: Base) -> None:
    made = edits(sd1, "age", steps=2)
    assert {edit.op for edit in made} == {"weight"} and any(e.tensors["up"].any() for e in made)
