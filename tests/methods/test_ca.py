"""Concept Ablation: noised pictures of the anchor, the student as its own teacher."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small import TASK, edits, lesson, settings

from conceptzap.base import CROSS_KV, Base
from conceptzap.methods import ca
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training import distil, objectives
from conceptzap.training.objectives import Trajectories


@pytest.fixture
def first_terms(monkeypatch: pytest.MonkeyPatch) -> list:
    """The terms of the first step, and the rows that they were made of."""
    seen: list = []

    def optimise(base, task, cfg, report, groups, sources, terms, stage="") -> None:
        generator = objectives.step_generator(report.seed, 0)
        batches = [source.draw(generator, cfg.batch, 0, 1) for source in sources]
        seen.extend([batches, [(name, loss.item()) for name, loss, _ in terms(0, *batches)]])

    monkeypatch.setattr(distil, "optimise", optimise)
    return seen


def test_the_first_loss_is_what_the_definition_says(sd1: Base, first_terms: list) -> None:
    cfg = config.resolve(ca.Config, settings("ca", retain=0.0))
    list(ca.erase(sd1, TASK, cfg, Report(seed=0)))
    (drawn, _), terms = first_terms
    with torch.no_grad():
        anchor, concept = (sd1.eps(drawn.x, drawn.t, cond) for cond in (drawn.concept, drawn.anchor))
    assert [name for name, _ in terms] == ["erase", "prior"]
    assert terms[0][1] == pytest.approx((concept - anchor).pow(2).mean().item(), rel=1e-4)
    assert terms[1][1] == pytest.approx(0, abs=1e-9)  # fresh weights draw the anchor as it is


def test_the_target_is_the_students_own(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    whole = distil.teacher
    monkeypatch.setattr(
        distil, "teacher",
        lambda base, batch, cond, edits=(): (asked.append(bool(edits)), whole(base, batch, cond, edits))[1],
    )  # fmt: skip
    made = edits(sd1, "ca", steps=1, retain=0.0)
    assert asked == [True, False]
    assert {site for edit in made for site in edit.sites} == set(sd1.sites(CROSS_KV))


@pytest.fixture
def pictures(sd1: Base) -> Iterator[distil.Noised]:
    yield distil.Noised.of(sd1, Trajectories.of(sd1, lesson(sd1).pairs, 2, Report(seed=0)), 200, 400)


def test_noise_is_added_as_the_schedule_says(sd1: Base, pictures: distil.Noised) -> None:
    """q(x_t | x0) has mean sqrt(a) x0 and deviation sqrt(1 - a)."""
    rows = pictures.draw(torch.Generator().manual_seed(0), 512, 0, 1)
    assert 200 <= rows.t.min() and rows.t.max() < 400
    alpha = sd1.alphas[rows.t].view(-1, 1, 1, 1)
    same = (rows.concept.states == pictures.concept.states[0]).flatten(1).all(1)
    x0 = torch.where(same.view(-1, 1, 1, 1), *pictures.pictures[:, None].expand(-1, 512, -1, -1, -1))
    noise = (rows.x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_parts_are_the_batch(pictures: distil.Noised) -> None:
    whole, *parts = (
        pictures.draw(torch.Generator().manual_seed(1), 5, part, n) for part, n in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.equal(whole.x, torch.cat([part.x for part in parts]))
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))


def test_a_picture_is_the_trajectorys_end(sd1: Base) -> None:
    """With the noise that the base sees taken away, x_t is made of x0 and that noise again."""
    drawn = Trajectories.of(sd1, lesson(sd1).pairs, 2, Report(seed=0))
    x0, t = distil.pictures(sd1, drawn), int(drawn.times[-1])
    with torch.no_grad():
        eps = sd1.eps(drawn.latents[-1], t, drawn.concept)
    alpha = sd1.alphas[t]
    assert torch.allclose(alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps, drawn.latents[-1], atol=1e-4)
