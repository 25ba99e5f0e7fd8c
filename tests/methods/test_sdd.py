"""SDD: the student's own anchor as target, the moving average as result."""

from __future__ import annotations

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.methods import sdd
from conceptzap.training import distil


def test_the_average_moves_by_what_decay_leaves() -> None:
    mean, now = (Edit("weight", ("x",), {"up": torch.full((2,), value)}) for value in (1.0, 5.0))
    sdd.average_in([mean], [now], 0.75)
    assert mean.tensors["up"].tolist() == [2.0, 2.0]


def test_the_result_is_the_average_of_every_step(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    whole = sdd.average_in

    def watch(average, weights, decay) -> None:
        seen.append(weights[0].tensors["up"].detach().clone())
        whole(average, weights, decay)

    monkeypatch.setattr(sdd, "average_in", watch)
    first, *_ = edits(sd1, "sdd", steps=3, decay=0.5)
    expected = torch.zeros_like(seen[0])
    for one in seen:
        expected = 0.5 * expected + 0.5 * one
    assert len(seen) == 3 and torch.allclose(first.tensors["up"], expected, atol=1e-7)


def test_the_teacher_is_the_student(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    whole = distil.teacher
    monkeypatch.setattr(
        distil, "teacher",
        lambda base, batch, cond, edits=(): (asked.append(len(edits)), whole(base, batch, cond, edits))[1],
    )  # fmt: skip
    made = edits(sd1, "sdd", steps=2, retain=0.0)
    assert asked == [len(made)] * 2
