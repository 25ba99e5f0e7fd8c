"""Closed forms of many concepts side by side: what all of them ask of LAPACK is one batched call.

Contract: a closed form is written for one concept, as a generator that yields `function, *matrices` where it
would call the function, and is sent what that makes of them; what it returns is its solution. `together` runs
many, whatever they ask for and in how many rounds, `alone` one. A solution has the same bits in any company:
a batched call treats each matrix by itself, but MKL rounds by where in memory a matrix begins, so that only
those are stacked that all begin at a multiple of `ALIGNED` bytes; products, which are rounded in another way
in batches, are never asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from conceptzap.edit import Edit

ALIGNED = 64  # bytes, as torch's own tensors are

T = TypeVar("T")
Solving: TypeAlias = Generator[tuple[Any, ...], Any, T]
Unsolved: TypeAlias = Solving[list[Edit]]


def solved(concepts: Sequence[Iterable[Unsolved]]) -> list[list[Edit]]:
    """The edits of each concept, all that is unsolved of all concepts together."""
    asked = [list(parts) for parts in concepts]
    found = iter(together([part for parts in asked for part in parts]))
    return [[edit for _ in parts for edit in next(found)] for parts in asked]


def alone(solution: Solving[T]) -> T:
    return together([solution])[0]


def together(solutions: Sequence[Solving[T]]) -> list[T]:
    """The solution of each."""
    found: dict[int, T] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(solutions)))
    while answers:
        # 1. each goes on with its answer, to its end or to the next that it asks for
        asked: dict[tuple[Any, ...], dict[int, list[Tensor]]] = {}
        for number, answer in answers.items():
            try:
                function, *matrices = solutions[number].send(answer)
            except StopIteration as end:
                found[number] = end.value
                continue
            shapes = tuple(matrix.shape for matrix in matrices)
            company = None if all(matrix.nbytes % ALIGNED == 0 for matrix in matrices) else number
            asked.setdefault((function, shapes, company), {})[number] = matrices
        # 2. those that ask for the same of equal shapes are answered at once
        answers = {}
        for (function, *_), same in asked.items():
            answers |= zip(same, _call(function, list(same.values())), strict=True)
    return [found[number] for number in range(len(solutions))]


def _call(function: Callable[..., Any], many: Sequence[Sequence[Tensor]]) -> list[Any]:
    """The function of n lists of matrices: for each a tensor, or a tuple of them."""
    made = function(*(torch.stack(same) for same in zip(*many, strict=True)))
    if isinstance(made, Tensor):
        return [one.clone() for one in made]
    return [tuple(part.clone() for part in one) for one in zip(*made, strict=True)]
