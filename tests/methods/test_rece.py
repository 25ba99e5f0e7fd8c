"""RECE: the derived state is a least squares solution; rounds multiply into one pair."""

from __future__ import annotations

import torch
from small import edits, lesson

from conceptzap.base import CROSS_KV, Base
from conceptzap.methods import rece
from conceptzap.training import subspace
from conceptzap.training.closed_form import Moves
from conceptzap.training.solving import alone


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def derived(c: torch.Tensor, pair: dict[str, torch.Tensor], gram: torch.Tensor, share: float) -> torch.Tensor:
    return c @ alone(rece.restoring(pair, gram, share)).T


def test_sums_over_derived_states_are_made_of_those_over_the_concepts() -> None:
    c, target, keep, back = (randn(*shape, seed=i) for i, shape in enumerate([(9, 6), (9, 6), (4, 6), (6, 6)]))
    found, wanted = rece.restored(Moves.of(c, target, keep), back), Moves.of(c @ back.T, target, keep)
    for name in ("gram", "cross", "kept"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name))
    assert (found.n, found.m) == (9, 4)


def test_the_derived_state_solves_its_least_squares() -> None:
    """eq. 9: sum_l |W_l M c' - W_l c|^2 + lambda |c'|^2, as stacked rows."""
    weights, c = [randn(7, 12, seed=i) for i in range(3)], randn(5, 12, seed=9)
    pair = {"into": randn(12, 2, seed=4), "down": randn(2, 12, seed=5)}
    gram = sum(w.T @ w for w in weights)
    lam = 0.3 * gram.diagonal().mean()
    m = torch.eye(12, dtype=torch.double) + pair["into"] @ pair["down"]
    rows = torch.cat([*(w @ m for w in weights), lam.sqrt() * torch.eye(12, dtype=torch.double)])
    wanted = torch.cat([*(w @ c.T for w in weights), torch.zeros(12, 5, dtype=torch.double)])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(derived(c, pair, gram, 0.3), expected, atol=1e-8)


def test_what_the_edit_undoes_nothing_of_restores_itself(sd1: Base) -> None:
    """Without an edit and without lambda the state that draws like c is c, in what W can see."""
    gram = rece.value_gram(sd1)
    none = {"into": torch.zeros(32, 1), "down": torch.zeros(1, 32)}
    c = subspace.states_of(sd1, [lesson(sd1)], 4).source[:3]
    assert torch.allclose(derived(c, none, gram, 1e-9), c, atol=1e-5)


def test_rounds_multiply() -> None:
    first, second = ({"into": randn(6, 2, seed=i), "down": randn(2, 6, seed=i + 1)} for i in (0, 5))
    eye = torch.eye(6, dtype=torch.double)
    m1, m2 = (eye + pair["into"] @ pair["down"] for pair in (first, second))
    both = rece.compose(first, second)
    assert torch.allclose(eye + both["into"] @ both["down"], m1 @ m2)


def test_every_round_adds_its_rank_and_nears_the_anchor(sd1: Base) -> None:
    told = subspace.states_of(sd1, [lesson(sd1)], 12)
    gram = rece.value_gram(sd1)
    gaps = []
    for rounds in (0, 2):
        (edit,) = edits(sd1, "rece", rounds=rounds, more_rank=3, rank=4, keep_scale=1.0)
        assert edit.sites == sd1.sites(CROSS_KV) and edit.tensors["down"].shape == (4 + 3 * rounds, 32)
        restored = derived(told.source, edit.tensors, gram, 0.1)
        drawn = restored + restored @ (edit.tensors["into"] @ edit.tensors["down"]).T.double()
        gaps.append((drawn - told.source).norm())
    assert gaps[1] > gaps[0]  # what restores the concept restores less of it
