"""Solutions side by side: who asks for the same is answered at once, with the bits of being alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conceptzap.training import solving


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def strongest(matrix: torch.Tensor, rounds: int) -> solving.Solving[list[torch.Tensor]]:
    """Of so many powers the strongest direction, found one after the other."""
    found = []
    for _ in range(rounds):
        inverse = yield torch.linalg.inv, matrix
        _, vectors = yield torch.linalg.eigh, matrix @ matrix.T
        found.append(vectors[:, -1])
        matrix = matrix @ inverse @ matrix
    return found


@pytest.mark.parametrize("width", [5, 24, 101])  # 5 and 101: a batch's matrices would begin anywhere
def test_a_solution_has_the_same_bits_in_any_company(width: int) -> None:
    matrices, rounds = randn(6, width, width), (1, 3, 0, 2, 3, 1)
    alone = [solving.alone(strongest(*one)) for one in zip(matrices, rounds, strict=True)]
    other = randn(3, 8, 8, seed=1)
    for order in ([0, 1, 2, 3, 4, 5], [5, 1, 3]):
        some = [strongest(matrices[number], rounds[number]) for number in order]
        found = solving.together([*some, *(strongest(one, 2) for one in other)])
        for number, mine in zip(order, found, strict=False):
            assert len(mine) == rounds[number]
            assert all(map(torch.equal, mine, alone[number]))


def test_who_asks_for_the_same_of_the_same_shape_is_answered_at_once() -> None:
    calls: list[tuple[int, ...]] = []

    def negated(stacked: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(stacked.shape))
        return -stacked

    def asking(*sizes: int) -> solving.Solving[int]:
        for size in sizes:
            matrix = randn(size, size)
            assert torch.equal((yield negated, matrix), -matrix)
        return sum(sizes)

    sizes: list[tuple[int, ...]] = [(8, 4), (8,), (4, 4), (), (3,), (3,)]
    assert solving.together([asking(*some) for some in sizes]) == [12, 8, 8, 0, 3, 3]
    assert sorted(calls) == [(1, 3, 3), (1, 3, 3), (1, 4, 4), (2, 4, 4), (2, 8, 8)]


def test_each_concept_has_its_own_edits_in_its_own_order() -> None:
    def unsolved(names: str) -> Iterator[solving.Unsolved]:
        return (part(name) for name in names)

    def part(name: str) -> Any:
        yield torch.linalg.inv, torch.eye(len(names) + 1)
        return [name, name.upper()]

    names = "abc"
    found: list[list[Any]] = solving.solved([unsolved("ab"), unsolved(""), unsolved("c")])
    assert found == [["a", "A", "b", "B"], [], ["c", "C"]]
