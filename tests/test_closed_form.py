"""The closed form against the dense ridge problem it stands for, and which state becomes which."""

from __future__ import annotations

import pytest
import torch

from conceptzap.base import CROSS_KV, Base
from conceptzap.training import closed_form
from conceptzap.training.wordings import Pair

START, END = 100, 101
KEEP_SCALE, RIDGE = 2.0, 0.01


def problem(width: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, width, generator=generator) for n in (30, 30, 50))


def dense(c: torch.Tensor, wanted: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """M as the least squares solution of the stacked rows, one for each term of the objective."""
    c, wanted, p = c.double(), wanted.double(), p.double()
    eye = torch.eye(c.shape[1], dtype=c.dtype) * RIDGE**0.5
    weights = len(c) ** -0.5, (KEEP_SCALE / len(p)) ** 0.5
    rows = torch.cat([weights[0] * c, weights[1] * p, eye])
    targets = torch.cat([weights[0] * wanted, weights[1] * p, eye])
    return torch.linalg.lstsq(rows, targets).solution.T


def solve(c: torch.Tensor, wanted: torch.Tensor, p: torch.Tensor, rank: int = 12) -> torch.Tensor:
    slots = closed_form.solve(c, wanted, p, rank=rank, ridge=RIDGE, keep_scale=KEEP_SCALE)
    assert slots["into"].shape == (c.shape[1], rank) and slots["down"].shape == (rank, c.shape[1])
    return torch.eye(c.shape[1]) + slots["into"] @ slots["down"]


def test_at_full_rank_it_is_the_dense_ridge_solution() -> None:
    c, wanted, p = problem()
    assert torch.allclose(solve(c, wanted, p).double(), dense(c, wanted, p), atol=1e-5)


def test_for_a_layer_it_is_uce_with_the_layers_own_targets() -> None:
    """Eq. 7 with v* = W c*: sum(v* c^T + s W p p^T + l W)(sum c c^T + s p p^T + l I)^-1 = W M."""
    c, wanted, p = (one.double() for one in problem())
    w = torch.randn(5, 12, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    eye = torch.eye(12, dtype=torch.double)
    gram = c.T @ c / len(c) + KEEP_SCALE * p.T @ p / len(p) + RIDGE * eye
    right = w @ (wanted.T @ c / len(c) + KEEP_SCALE * p.T @ p / len(p) + RIDGE * eye)
    m = solve(*problem())
    assert torch.allclose(w @ m.double(), right @ torch.linalg.inv(gram), atol=1e-5)


def test_fewer_ranks_fit_the_states_worse_and_never_by_chance_better() -> None:
    c, wanted, p = problem()
    full = dense(c, wanted, p).float()
    gaps = [(c @ (solve(c, wanted, p, rank) - full).T).norm().item() for rank in (1, 4, 8, 12)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-4 < gaps[-2]


def test_what_need_not_move_does_not() -> None:
    c, _, p = problem()
    assert torch.allclose(solve(c, c, p), torch.eye(12), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "instead", "concept", "anchor", "expected"),
    [
        # "a painting of t by C" -> "a painting of t": words both have become each other
        ([1, 2, 3, 7, 4], [1, 2, 3], [7], [], [-1, -1, -1, -1, 4, 4, 6, 7]),
        # "C of t" -> "A of t"
        ([7, 2, 3], [8, 2, 3], [7], [8], [-1, 1, 2, 3, 4, 5, 6, 7]),
        # two tokens become the anchor's last of two
        ([1, 6, 7, 3], [1, 8, 9, 3], [6, 7], [8, 9], [-1, -1, 3, 3, 4, 5, 6, 7]),
    ],
)
def test_which_state_becomes_which(
    asked: list[int], instead: list[int], concept: list[int], anchor: list[int], expected: list[int]
) -> None:
    rows = [([START, *words] + [END] * 8)[:8] for words in (asked, instead)]
    assert closed_form.align(*rows, concept, anchor, END) == expected


def test_states_in_front_of_the_concept_stay(sd1: Base) -> None:
    pairs = [Pair("a painting of a cat by monet", "a painting of a cat")]
    source, target, prefix = closed_form.aligned_states(sd1, pairs, "monet", "")
    own = sd1.encode([pairs[0].concept]).states[0]
    assert torch.equal(prefix, own[: len(prefix)]) and torch.equal(source, own[len(prefix) :])
    assert source.shape == target.shape and len(prefix) == 7  # start and six words


def test_an_edit_of_every_layer_is_one_pair(sd1: Base) -> None:
    pairs = [Pair("a cat", "a dog"), Pair("a photo of a cat", "a photo of a dog")]
    source, target, prefix = closed_form.aligned_states(sd1, pairs, "cat", "dog")
    slots = closed_form.solve(source, target, prefix, rank=8, ridge=1e-3, keep_scale=4.0)
    moved = source + source @ slots["down"].T @ slots["into"].T
    assert (moved - target).norm() < 0.5 * (source - target).norm()
    stayed = prefix @ slots["down"].T @ slots["into"].T
    assert stayed.pow(2).mean() < 0.1 * (source - target).pow(2).mean()
    widths = {sd1.module(site).weight.shape[1] for site in sd1.sites(CROSS_KV)}
    assert widths == {source.shape[1]}
