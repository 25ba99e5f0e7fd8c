"""Forget-Me-Not: the norm of attention at the concept's tokens, and that it falls."""

from __future__ import annotations

import torch
from small import edits, lesson

from conceptzap.base import Base
from conceptzap.methods import fmn
from conceptzap.report import Report
from conceptzap.runtime import attention
from conceptzap.runtime.attach import attached
from conceptzap.training import attending
from conceptzap.training.attending import Marked, MarkedLatents


def test_marks_are_the_concepts_tokens_and_with_end_all_behind_the_text(sd1: Base) -> None:
    asked = ["a photo of a cat", "cat", "a dog"]
    found = attending.marks(sd1, asked, ["cat"])
    assert [row.nonzero().flatten().tolist() for row in found] == [[5], [1], []]
    last = found.shape[1] - 1
    behind = attending.marks(sd1, asked, ["cat"], end=True)
    assert behind[0].nonzero().flatten().tolist() == list(range(5, last + 1))
    assert behind[2].nonzero().flatten().tolist() == list(range(3, last + 1))


def rows(base: Base) -> Marked:
    source = MarkedLatents.of(base, [lesson(base)], 2, Report(seed=0))
    return source.draw(torch.Generator().manual_seed(0), 2, 0, 1)


def watch(base: Base, batch: Marked, made: list) -> list[torch.Tensor]:
    with torch.no_grad(), attached(base.unet, made), attention.captured(base) as taken:
        base.eps(batch.x, batch.t, batch.concept)
    return attending.shares(taken, batch.marks)


def test_shares_are_the_softmax_at_the_marks(sd1: Base) -> None:
    batch = rows(sd1)
    everything = Marked(
        batch.x, batch.t, batch.concept, batch.anchor, marks=torch.ones_like(batch.marks)
    )
    assert all(torch.allclose(share, torch.ones_like(share)) for share in watch(sd1, everything, []))
    shares = watch(sd1, batch, [])
    assert all(0 < share.mean() < 0.5 for share in shares)
    flat = torch.cat([share.flatten(1) for share in shares], 1)
    assert torch.isclose(fmn.norm(shares), flat.pow(2).mean(1).sqrt().mean(), rtol=1e-4)


def test_the_loss_is_the_norm_and_it_falls(sd1: Base) -> None:
    batch = rows(sd1)
    made = edits(sd1, "fmn", steps=12, retain=0.0, end=False)
    assert {site.rpartition(".")[2] for edit in made for site in edit.sites} == {"to_q", "to_k"}
    before, after = (fmn.norm(watch(sd1, batch, e)).item() for e in ([], made))
    assert after < before


def test_between_keeps_the_latents_of_a_window(sd1: Base) -> None:
    source = MarkedLatents.of(sd1, [lesson(sd1)], 2, Report(seed=0))
    middle = int(source.drawn.times[1])
    assert source.between(middle, middle + 1).drawn.times.tolist() == [middle]
    assert len(source.between(2000, 3000).drawn.times) == 1
