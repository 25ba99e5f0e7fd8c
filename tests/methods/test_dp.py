"""DP: what is kept is not seen at all, what goes becomes its anchor exactly."""

from __future__ import annotations

import torch
from small import edits

from conceptzap.base import CROSS_KV, Base
from conceptzap.methods import dp
from conceptzap.training import subspace
from conceptzap.training.closed_form import Moves
from conceptzap.training.solving import alone


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def test_the_null_space_leaks_nothing_and_the_concept_arrives() -> None:
    keep, source, target = randn(20, 32), randn(3, 32, seed=1), randn(3, 32, seed=2)
    null = alone(subspace.null_space(keep.T @ keep, 1e-9))
    assert null.shape == (32, 12)
    pair = alone(dp.double_projection(Moves.of(source, target, keep), null, rank=8))
    change = pair["into"] @ pair["down"]
    assert pair["into"].shape == (32, 3)
    assert (keep @ change.T).abs().max() < 1e-10
    assert torch.allclose(source + source @ change.T, target, atol=1e-10)


def test_one_state_is_the_published_rank_one_form() -> None:
    """I + (c* - c) u^T with u = U U^T c / |U^T c|^2."""
    keep, c, wanted = randn(9, 16), randn(1, 16, seed=1), randn(1, 16, seed=2)
    null = alone(subspace.null_space(keep.T @ keep, 1e-9))
    pair = alone(dp.double_projection(Moves.of(c, wanted, keep), null, rank=4))
    u = null @ null.T @ c[0] / (null.T @ c[0]).pow(2).sum()
    assert torch.allclose(pair["into"] @ pair["down"], torch.outer((wanted - c)[0], u), atol=1e-10)


def test_one_ungated_pair_serves_every_key_and_value(sd1: Base) -> None:
    (edit,) = edits(sd1, "dp", rank=5)
    assert edit.sites == sd1.sites(CROSS_KV) and edit.gates == ()
    assert edit.tensors["into"].shape == (32, 5) and edit.tensors["down"].shape == (5, 32)
