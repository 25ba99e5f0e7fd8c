"""P-ESD: hard-concrete masks that training lowers, stored as zeroed inputs."""

from __future__ import annotations

import math

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.methods import pesd


def test_the_gate_is_closed_open_and_half_where_it_should_be() -> None:
    assert pesd.gate(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, 0.5, 1.0]


def test_noisy_masks_are_open_as_often_as_hard_concrete_says() -> None:
    """P(m > 0) = sigma(log p - beta log(-gamma / zeta)) (Louizos et al., eq. 12)."""
    logits = {"x": torch.nn.Parameter(torch.full((20_000,), -1.0))}
    masks = pesd.sample(logits, torch.Generator().manual_seed(0))["x"]
    expected = torch.tensor(-1.0 - pesd.BETA * math.log(0.1 / 1.1)).sigmoid().item()
    assert (masks > 0).float().mean().item() == pytest.approx(expected, abs=0.01)
    assert masks.min() == 0 and masks.max() == 1


def test_cut_is_what_is_masked_by_half_and_one_at_least() -> None:
    masks = pesd.cut({"a": torch.tensor([-1.0, 2.0]), "b": torch.tensor([3.0, -0.5, 1.0])})
    assert masks["a"].tolist() == [True, False] and masks["b"].tolist() == [False, True, False]
    masks = pesd.cut({"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([3.0, 2.9])})
    assert not masks["a"].any() and masks["b"].tolist() == [False, True]


def test_masks_multiply_the_inputs(sd1: Base) -> None:
    site = sd1.sites("unet.*.ff.net.2")[0]
    module, width = sd1.module(site), sd1.module(site).weight.shape[1]
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    mask = torch.linspace(0, 1, width)
    with torch.no_grad():
        plain, scaled = module(x), module(x * mask)
        with pesd.masked(sd1, {site: mask}):
            assert torch.equal(module(x), scaled)
        assert torch.equal(module(x), plain)


def test_it_yields_masks_over_inputs(sd1: Base) -> None:
    made = edits(sd1, "pesd", lr=2.0, steps=6)
    for edit in made:
        weight = sd1.module(edit.sites[0]).weight
        assert edit.tensors["keep"].dtype == torch.bool and edit.tensors["keep"].shape == weight.shape[1:]
        assert 0 < (~edit.tensors["keep"]).sum() < weight.shape[1]
