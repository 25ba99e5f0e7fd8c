"""SPM: membranes of rank one everywhere in the transformers, anchored, and let through by nearness."""

from __future__ import annotations

import torch
from small import edits

from conceptzap.base import Base
from conceptzap.methods import spm
from conceptzap.runtime.gates import Signal, factor


def test_a_membrane_is_at_every_layer_of_the_transformers(base: Base) -> None:
    made = spm.membranes(base, "unet.*.attentions.*", 1, 0)
    layers = {
        f"unet.{name}" for name, module in base.unet.named_modules()
        if ".attentions." in name and getattr(module, "weight", torch.empty(0)).ndim in (2, 4)
    }  # fmt: skip
    assert {edit.sites[0] for edit in made} == layers
    for edit in made:
        up, down = edit.tensors["up"], edit.tensors["down"]
        weight = base.module(edit.sites[0]).weight
        assert (up.flatten(1) @ down.flatten(1)).shape == weight.flatten(1).shape and down.shape[0] == 1
        assert not up.any() and down.shape[1:] == weight.shape[1:]


def test_random_texts_have_the_mean_and_spread_of_real_ones(base: Base) -> None:
    told = base.encode(["a cat", "a dog", "a red house", "a church by monet"])
    strange = spm.random_texts(told, 64, 0)
    assert len(strange) == 64 and strange.states.shape[1:] == told.states.shape[1:]
    assert torch.allclose(strange.states.mean(0), told.states.mean(0), atol=0.6)
    assert torch.allclose(strange.states.std((0, 1)), told.states.std((0, 1)), rtol=0.6)
    assert not strange.states.equal(spm.random_texts(told, 64, 1).states)
    assert (strange.pooled is None) == (told.pooled is None)


def test_the_change_is_let_through_as_the_prompt_comes_near(sd1: Base) -> None:
    made = edits(sd1, "spm")
    (gate,) = {gate.name: gate for edit in made for gate in edit.gates}.values()
    assert gate.kind == "similar"
    asked = ["a picture of a cat", "a cat", "a dog", "a church", ""]
    opened = factor(made[0], Signal(sd1.encode(asked).states, torch.zeros(5)))
    assert opened[:2].min() > 0.9 and opened[4] == 0
    assert any(edit.tensors["up"].abs().max() > 0 for edit in made)
