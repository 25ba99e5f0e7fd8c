"""OCE: a rotation, the best one for its objective, of each layer's values."""

from __future__ import annotations

import torch
from small import edits

from conceptzap.base import CROSS_V, Base
from conceptzap.methods import oce
from conceptzap.registry import config
from conceptzap.training.solving import alone


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


CFG = config.resolve(oce.Config)


def parts() -> tuple[torch.Tensor, ...]:
    weight, gone, instead, keep = randn(10, 8), randn(6, 10, seed=1), randn(6, 10, seed=2), randn(20, 8, seed=3)
    return weight, *(alone(oce.projector(values.T @ values, 2)) for values in (gone, instead)), keep.T @ keep / 20


def test_a_projector_is_one() -> None:
    _, gone, _, _ = parts()
    assert torch.allclose(gone @ gone, gone) and torch.allclose(gone, gone.T)
    assert round(gone.diagonal().sum().item()) == 2


def test_it_turns_and_no_rotation_does_better() -> None:
    weight, gone, instead, gram = parts()
    turn = alone(oce.rotation(weight, gone, instead, gram, CFG))
    eye = torch.eye(10, dtype=torch.double)
    assert torch.allclose(turn @ turn.T, eye, atol=1e-10)
    target = -CFG.erase * (eye - instead) @ gone
    target += CFG.keep * oce.scaled(weight @ gram @ weight.T) + CFG.whole * oce.scaled(weight @ weight.T)
    best = (turn * target).sum()
    for seed in range(20):
        other, _ = torch.linalg.qr(turn + 0.3 * randn(10, 10, seed=seed))
        assert (other * target).sum() <= best + 1e-9


def test_lengths_and_angles_between_neurons_stay() -> None:
    weight, *rest = parts()
    turned = alone(oce.rotation(weight, *rest, CFG)) @ weight
    assert torch.allclose(turned.T @ turned, weight.T @ weight, atol=1e-10)


def test_with_nothing_to_erase_nothing_turns() -> None:
    weight, gone, _, gram = parts()
    turn = alone(oce.rotation(weight, gone, torch.eye(10, dtype=torch.double), gram, CFG))
    assert torch.allclose(turn @ weight, weight, atol=1e-8)


def test_it_stands_at_the_values(sd1: Base) -> None:
    made = edits(sd1, "oce", rank=3)
    assert {site for edit in made for site in edit.sites} == set(sd1.sites(CROSS_V))
    assert {edit.tensors["down"].shape for edit in made} == {(3, 32)}
