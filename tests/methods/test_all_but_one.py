"""All but One: the guidance arrives at the alternative's, the unconditional score stays."""

from __future__ import annotations

import pytest
import torch
from small import edits, lesson, settings

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.methods import all_but_one
from conceptzap.runtime.attach import attached
from conceptzap.runtime.guides import Guidance
from conceptzap.training import lessons, objectives

KEPT = "a photo of a horse"


def halves(base: Base, concept: str, made: list[Edit]) -> torch.Tensor:
    """The unconditional prediction and the one for a concept, [2, c, h, w]."""
    both = Cond.cat([base.unconditional(), base.encode([concept])])
    with torch.no_grad(), attached(base.unet, made), Guidance(lambda rows: rows // 2).told():
        return base.predict(base.noise([1, 1]), 500, both)


def test_the_guide_gives_the_alternatives_guidance_and_the_same_score(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [[prompt for prompt in prompts for _ in "ab"] for prompts in (["cat", "a cat"], ["", KEPT, "dog"])]
    monkeypatch.setattr(lessons, "sides", lambda *_: few)  # what random states tell apart
    (edit,) = edits(base, "all_but_one")
    plain, steered = halves(base, "cat", []), halves(base, "cat", [edit])
    assert steered[0].equal(plain[0])
    assert torch.allclose(steered[1], halves(base, "dog", [])[1], atol=1e-5)
    if base.family == "sdxl":  # no gate can tell the halves of random encoders
        return
    assert halves(base, KEPT, [edit]).equal(halves(base, KEPT, []))


def test_the_loss_is_the_published_one(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """|| g_theta(c) - g(a) ||^2 + pin || eps_theta(0) - eps(0) ||^2; at the base itself the pin is 0."""
    found: list[float] = []
    train = objectives.optimise

    def spy(base: Base, groups: object, losses: object, *args: object, **kwargs: object) -> None:
        name, loss, _ = next(losses(1, 0, 1))
        assert name == "guidance"
        found.append(loss.item())
        train(base, groups, losses, *args, **kwargs)

    monkeypatch.setattr(objectives, "optimise", spy)
    made = edits(sd1, "all_but_one", form="weights", retain=0.0)
    assert {edit.op for edit in made} == {"weight"} and not any(edit.gates for edit in made)
    pairs = [pair for pair in lesson(sd1).pairs]
    chosen = settings("all_but_one")
    drawn = objectives.Trajectories.of(sd1, pairs, chosen["trajectories"], all_but_one.Report(seed=0))
    rows = drawn.draw(objectives.step_generator(0, 1), chosen["batch"])
    with torch.no_grad():  # u cancels in g_theta(c) - g(a) before the first step
        gap = sd1.eps(rows.x, rows.t, rows.concept) - sd1.eps(rows.x, rows.t, rows.anchor)
    assert found[0] == pytest.approx(gap.pow(2).mean().item(), rel=1e-3)


def test_a_form_that_is_none(sd1: Base) -> None:
    with pytest.raises(UsageError, match="form"):
        edits(sd1, "all_but_one", form="lora")
