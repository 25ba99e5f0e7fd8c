"""SPEED: the null space and the invariants are untouched; one state of a concept is one rank."""

from __future__ import annotations

import pytest
import torch
from small import TASK, edits

from conceptzap.base import CROSS_V, Base
from conceptzap.methods import speed
from conceptzap.registry import config
from conceptzap.task import Task
from conceptzap.training import subspace
from conceptzap.training.closed_form import Moves
from conceptzap.training.solving import alone


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


CFG = config.resolve(speed.Config, {"threshold": 1e-9, "eta": 1e-6})


def test_null_space_and_invariants_are_untouched_and_the_concept_arrives() -> None:
    keep, fixed = randn(12, 32), randn(32, 4, seed=3)
    source, target = randn(2, 32, seed=1), randn(2, 32, seed=2)
    change = alone(speed.null_constrained(Moves.of(source, target, keep), fixed, CFG))
    assert (change @ keep.T).abs().max() < 1e-10 and (change @ fixed).abs().max() < 1e-8
    assert torch.linalg.matrix_rank(change, atol=1e-6) == 2
    assert torch.allclose(source + source @ change.T, target, atol=1e-4)


def test_without_constraints_it_is_ridge_regression() -> None:
    """P = I, no invariants: dW = W (C* - C_1)(C_1 + eta I)^-1."""
    source, target = randn(6, 8, seed=1), randn(6, 8, seed=2)
    cfg = config.resolve(speed.Config, {"threshold": 10.0, "eta": 0.5})
    sums = Moves.of(source, target, torch.eye(8))
    change = alone(speed.null_constrained(sums, torch.zeros(8, 4).double(), cfg))
    c1 = source.T @ source / 6
    expected = (target - source).T @ source / 6 @ torch.linalg.inv(c1 + 0.5 * torch.eye(8))
    assert torch.allclose(change, expected, atol=1e-10)


def test_the_kept_states_that_layers_are_moved_by_most_and_copies_of_them() -> None:
    """As by the layers themselves, [out, d]: what they make of the unconstrained edit, and are blind to."""
    weight, source, target, keep = (randn(rows, 8, seed=rows) for rows in (40, 6, 7, 30))
    target = target[:6]
    cfg = config.resolve(speed.Config, {"copies": 2})
    sums = Moves.of(source, target, keep)
    found = speed.influenced(sums, keep, speed.sight(weight), cfg, 0)
    naive = (target - source).T @ source / 6 @ torch.linalg.inv(source.T @ source / 6 + torch.eye(8).double())
    moved = (keep @ (weight @ naive).T).norm(dim=1)
    chosen = keep[moved > moved.mean()]
    assert 0 < len(chosen) < 30 and found[: len(chosen)].equal(chosen)
    shifts = torch.randn(2, len(chosen), generator=torch.Generator().manual_seed(0)).double()
    shifts = cfg.noise * keep.norm(dim=1).mean() * shifts.flatten()[:, None]
    copies = chosen.repeat(2, 1) + shifts * speed.sight(weight)[1]
    moved = (copies @ (weight @ naive).T).norm(dim=1)
    wanted = copies[moved > moved.mean()]
    assert 0 < len(wanted) < len(copies) and torch.allclose(found[len(chosen) :], wanted)
    blind = torch.linalg.svd(weight).Vh[-1]
    assert abs(blind @ speed.sight(weight)[1]) > 1 - 1e-9


def test_an_invariant_that_is_spared_already_does_no_harm() -> None:
    keep, source, target = randn(12, 32), randn(2, 32, seed=1), randn(2, 32, seed=2)
    spared = keep[:4].T.contiguous()
    sums = Moves.of(source, target, keep)
    assert alone(speed.null_constrained(sums, spared, CFG)).isfinite().all()


def test_the_cut_sees_no_more_than_the_change() -> None:
    change, states = randn(8, 8), randn(30, 8, seed=1)
    unseen = torch.linalg.svd(change - change @ torch.outer(states[0], states[0]) / states[0].norm() ** 2)
    assert unseen.S[-1] < 1e-10
    pair = alone(subspace.cut(change, states.T @ states, 3))
    best = torch.linalg.svd(change @ states.T).S[3:].pow(2).sum().sqrt()
    left = (change.float() - pair["into"] @ pair["down"]) @ states.T.float()
    assert left.norm().item() == pytest.approx(best.item(), rel=1e-4)


def test_the_last_token_alone_is_rank_one_a_concept(sd1: Base) -> None:
    both = Task(("cat", "house"), ("dog", "castle"), TASK.keep)
    for task, rank in ((TASK, 1), (both, 2)):
        (edit,) = edits(sd1, "speed", task, last=True)
        assert edit.sites == sd1.sites(CROSS_V) and edit.tensors["down"].shape == (rank, 32)


def test_the_start_of_text_stays(sd1: Base) -> None:
    (edit,) = edits(sd1, "speed")
    start, cat = sd1.encode(["a cat"]).states[0][[0, 3]]
    moved = [edit.tensors["into"] @ (edit.tensors["down"] @ state) for state in (start, cat)]
    assert moved[0].norm() < 1e-3 * moved[1].norm()


def test_invariants_are_the_start_and_centres_of_the_padding() -> None:
    empty = torch.tensor([[9.0, 9], [0, 1], [0, 1], [5, 0], [5, 0], [0, -3]]).double()
    found = {tuple(column) for column in speed.invariants(empty).T.round().tolist()}
    assert (9.0, 9.0) in found and len(found) == 4
