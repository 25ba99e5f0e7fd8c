"""EAP: the players take turns; the choice is hard with soft gradients and goes where it hurts."""

from __future__ import annotations

import pytest
import torch
from small import lesson, settings

from conceptzap.base import Base, Cond
from conceptzap.methods import eap
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training import distil


@pytest.fixture
def rivals(sd1: Base) -> eap.Rivals:
    cfg = config.resolve(eap.Config, settings("eap", candidates=4))
    return eap.Rivals.of(sd1, list(lesson(sd1).keep), cfg, Report(seed=0))


def test_a_draw_is_one_hot_with_the_softmaxs_gradient() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    gumbel = torch.tensor([[0.5, 0.1, 3.0]])
    choice = eap.straight_through(logits, gumbel, 2.0)
    assert choice.tolist() == [[0, 0, 1]]
    value = torch.tensor([1.0, 2.0, 5.0])
    (found,) = torch.autograd.grad((choice * value).sum(), logits)
    (expected,) = torch.autograd.grad(((logits + gumbel) / 2).softmax(-1)[0] @ value, logits)
    assert torch.allclose(found, expected)


def test_rows_are_latents_and_states_of_the_chosen_prompt(rivals: eap.Rivals) -> None:
    rows = rivals.draw(torch.Generator().manual_seed(0), 6, 0, 1)
    for x, t, states in zip(rows.x, rows.t, rows.concept.states, strict=True):
        when = rivals.drawn.times.tolist().index(int(t))
        which = [torch.equal(x, one) for one in rivals.drawn.latents[when]].index(True)
        assert torch.allclose(states, rivals.drawn.concept.states[which], atol=1e-6)


def test_halves_of_a_batch_are_its_rows(rivals: eap.Rivals) -> None:
    whole, *parts = (
        rivals.draw(torch.Generator().manual_seed(1), 5, part, n) for part, n in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.equal(whole.x, torch.cat([part.x for part in parts]))


def test_the_choice_moves_to_the_concept_that_is_harmed_most(rivals: eap.Rivals) -> None:
    """With harm h_k per candidate, ascending E[harm] raises the logit of the most harmed one."""
    harm = torch.tensor([0.0, 0.0, 1.0, 0.0])[: len(rivals.logits)]
    for step in range(40):
        noise = -(-torch.rand(8, len(harm), generator=torch.Generator().manual_seed(step)).log()).log()
        choice = eap.straight_through(rivals.logits, noise, 2.0)
        (gradient,) = torch.autograd.grad((choice @ harm).mean(), rivals.logits)
        rivals.logits.data += gradient
    assert rivals.logits.argmax() == harm.argmax()


def test_mixing_keeps_every_field() -> None:
    cond = Cond(torch.arange(12.0).view(3, 2, 2), torch.eye(3), torch.ones(3, 6))
    both = distil.mixed(cond, torch.tensor([[0, 1.0, 0], [0.5, 0, 0.5]]))
    assert torch.equal(both.states[0], cond.states[1]) and torch.equal(both.time_ids, torch.ones(2, 6))
    assert both.pooled[1].tolist() == [0.5, 0, 0.5]
