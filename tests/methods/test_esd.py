"""ESD: its target, and the low-rank weights that are trained to meet it."""

from __future__ import annotations

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.training import objectives


def test_negative_guidance_steps_away_from_the_concept() -> None:
    concept, anchor = torch.tensor([3.0]), torch.tensor([1.0])
    assert objectives.negative_guidance(concept, anchor, 1.0).item() == -1
    assert objectives.negative_guidance(concept, anchor, 0.0).item() == 1


def test_an_edit_of_low_rank_stands_at_every_matching_layer(sd1: Base) -> None:
    made = edits(sd1, "esd", steps=1, rank=3)
    assert {s for e in made for s in e.sites} >= set(sd1.sites("unet.*.attn2.to_[qkv]"))
    assert all(edit.tensors["up"].shape[1] == 3 for edit in made)
    assert any(edit.tensors["up"].abs().sum() > 0 for edit in made)
    with pytest.raises(UsageError, match="no Linear"):
        edits(sd1, "esd", sites="nowhere")


def test_before_training_nothing_changes(sd1: Base) -> None:
    for edit in objectives.low_rank(sd1, "unet.*.attn2.to_*", 4, seed=0):
        assert not edit.tensors["up"].any()
