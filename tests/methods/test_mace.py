"""MACE: fusion is a least squares solution of low rank; refinement spares the concept's own words."""

from __future__ import annotations

import pytest
import torch
from small import TASK, edits, lesson

from conceptzap.base import CROSS_K, CROSS_KV, Base
from conceptzap.methods import mace
from conceptzap.registry import config
from conceptzap.task import Task

CFG = config.resolve(mace.Config, {"ridge": 0.1, "keep_scale": 2.0})


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def test_fusion_solves_its_least_squares() -> None:
    """argmin_D sum_i mean |(D - D_i) e|^2 + keep mean |D p|^2 + ridge |D|^2, as stacked rows."""
    changes = [{"up": randn(5, 1, seed=i), "down": randn(1, 8, seed=i + 5)} for i in range(2)]
    states, kept = [randn(20, 8, seed=i + 20) for i in range(2)], randn(30, 8, seed=40)
    rows = torch.cat(
        [*(e / 20**0.5 for e in states), (2 / 30) ** 0.5 * kept, 0.1**0.5 * torch.eye(8).double()]
    )
    wanted = [e @ (c["up"] @ c["down"]).T / 20**0.5 for e, c in zip(states, changes, strict=True)]
    zeros = torch.zeros(38, 5, dtype=torch.double)
    expected = torch.linalg.lstsq(rows, torch.cat([*wanted, zeros])).solution.T
    fused = mace.fuse(changes, [mace._gram(e) for e in states], mace._gram(kept), CFG)
    assert fused["up"].shape == (5, 2) and fused["down"].shape == (2, 8)
    assert torch.allclose(fused["up"].double() @ fused["down"].double(), expected, atol=1e-5)


def test_the_concepts_own_words_are_left_to_the_second_stage(sd1: Base) -> None:
    """Refined without a keep set, states behind the concept arrive nearer than the concept's own."""
    told = lesson(sd1)
    cfg = config.resolve(mace.Config, {"ridge": 1e-4, "keep_scale": 0.0, "refined": 32})
    pair = mace.refine(sd1, [told], torch.zeros(0, 32, dtype=torch.double), cfg)
    cat, dog = sd1.encode(["a cat", "a dog"]).states  # start, a, cat, end, padding
    moved = cat + cat @ pair["down"].T @ pair["into"].T
    gap = (moved - dog).norm(dim=1) / (cat - dog).norm(dim=1).clamp_min(1e-6)
    assert gap[3:8].mean() < 0.5 < gap[2]


def test_ranks_of_all_concepts_add_up(sd1: Base) -> None:
    both = Task(("cat", "house"), ("dog", "castle"), TASK.keep)
    for task, rank in ((TASK, 3), (both, 6)):
        first, *rest = edits(sd1, "mace", task, rank=3, refined=5)
        assert first.sites == sd1.sites(CROSS_KV) and first.tensors["down"].shape == (5, 32)
        assert {edit.sites[0] for edit in rest} == set(sd1.sites(CROSS_K))
        assert {edit.tensors["down"].shape for edit in rest} == {(rank, 32)}


def test_only_attention_within_the_region_counts() -> None:
    inside = torch.zeros(1, 1, 16, 16)
    inside[..., :8] = 1
    left, right = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16)
    left[..., :8], right[..., 8:] = 0.5, 0.5
    found = [mace.looks([share.flatten(2)], inside).item() for share in (left, right)]
    assert found[0] == pytest.approx(0.5, rel=1e-3) and found[1] < 1e-5
