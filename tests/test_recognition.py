"""The base as a judge: which of two texts explains a picture better."""

from __future__ import annotations

import edits as some
import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.result import Settings
from conceptzap.runtime.sampler import denoise
from conceptzap.training import memory, recognition
from conceptzap.training.recognition import rather


def test_the_same_text_is_as_good_and_the_other_way_round_the_opposite(sd1: Base) -> None:
    clean, one, other = sd1.noise(range(3)), sd1.encode(some.ASKED), sd1.encode(some.OTHER[:3])
    assert rather(sd1, clean, one, one, 0).equal(torch.zeros(3))
    there, back = rather(sd1, clean, one, other, 0), rather(sd1, clean, other, one, 0)
    assert torch.allclose(there, -back, atol=1e-6) and there.abs().min() > 0


def test_it_is_the_error_against_the_noise_that_counts(sd1: Base, monkeypatch) -> None:
    """Where a text makes the UNet see all of the noise and the other none: 1, by any timestep."""
    asked, clean = [], sd1.noise(range(2))

    def eps(base: Base, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        asked.append(int(t[0]))
        alpha = base.alphas[t].view(-1, 1, 1, 1)
        return (x - alpha.sqrt() * clean) / (1 - alpha).sqrt() * cond.states[:, :1, :1, None]

    monkeypatch.setattr(Base, "eps", eps)
    knows, blank = (Cond(torch.full((2, 4, 8), value)) for value in (1.0, 0.0))
    assert torch.allclose(rather(sd1, clean, knows, blank, 0), torch.ones(2), atol=1e-4)
    assert sorted({*asked}) == list(recognition.TIMES)


def test_many_pictures_are_looked_at_a_few_at_a_time(sd1: Base, monkeypatch) -> None:
    clean, one, other = sd1.noise(range(3)), sd1.encode(some.ASKED), sd1.encode(some.OTHER[:3])
    monkeypatch.setattr(memory, "rows_that_fit", lambda *_: 2)
    found = rather(sd1, clean, one, other, 5)
    assert torch.allclose(found[2:], rather(sd1, clean[2:], one[[2]], other[[2]], 7), atol=1e-6)


def test_the_checkpoint_knows_its_own_pictures(demo_base: Base) -> None:
    prompts = ["a church", "a picture of a church", "a house", "a picture of a house"]
    demo = demo_base
    walk = denoise(demo, demo.encode(prompts), demo.unconditional(), Settings(steps=10), demo.noise(range(4)))
    *_, (_, clean) = walk
    church, house = (demo.encode([text.replace("house", name).replace("church", name) for text in prompts])
                     for name in ("church", "house"))  # fmt: skip
    assert (rather(demo, clean, church, house, 0) > 0).tolist() == [True, True, False, False]
