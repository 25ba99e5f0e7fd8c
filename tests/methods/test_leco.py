"""LECO: its target, which is ESD's where the anchor is empty."""

from __future__ import annotations

import torch
from small import edits

from conceptzap.base import Base
from conceptzap.methods import leco
from conceptzap.training import objectives


def test_guidance_starts_from_the_empty_prompt() -> None:
    positive, neutral, empty = (torch.tensor([value]) for value in (3.0, 5.0, 1.0))
    assert leco.negative(positive, neutral, empty, 1.0).item() == 3
    assert leco.negative(positive, neutral, empty, 0.0).item() == 5


def test_with_an_empty_anchor_it_is_esds_target() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, empty = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    ours = leco.negative(positive, empty, empty, 0.7)
    assert torch.allclose(ours, objectives.negative_guidance(positive, empty, 0.7))


def test_it_stands_at_both_kinds_of_attention(sd1: Base) -> None:
    sites = {site for edit in edits(sd1, "leco", steps=1) for site in edit.sites}
    assert {site.split(".")[-2] for site in sites} >= {"attn1", "attn2"}
