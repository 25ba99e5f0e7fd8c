"""Text states: each prompt encoded once, in one task and, where it is asked for, in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import edits as some
import pytest
import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.report import Report
from conceptzap.runtime.attach import installed
from conceptzap.training import objectives, states
from conceptzap.training.states import States

FIRST = ["", "a church", "a photo of a house", "a cat by Monet"]
SECOND = ["a dog", *FIRST[1:3], "a painting of a castle"]


def same(one: States, other: States) -> bool:
    pairs = [(one.hidden, other.hidden), (one.ids, other.ids), (one.ends, other.ends)]
    pooled = [(one.pooled, other.pooled)] if one.pooled is not None else []
    return one.index == other.index and all(torch.equal(*pair) for pair in pairs + pooled)


def test_shared_states_are_those_that_are_read_alone(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever was read before and in however small chunks; each prompt is read once."""
    alone = [States.of(base, prompts) for prompts in (FIRST, SECOND, SECOND)]
    read: list[str] = []
    encode = type(base).encode
    monkeypatch.setattr(type(base), "encode", lambda self, asked: read.extend(asked) or encode(self, asked))
    with states.shared():
        together = [States.of(base, prompts) for prompts in (FIRST, SECOND, SECOND)]
    assert all(map(same, alone, together))
    if base.family != "sdxl":  # its pooled text is not the same bit for bit in other company
        assert read == [*FIRST, SECOND[0], SECOND[3]]
    read.clear()
    States.of(base, FIRST)
    assert read == FIRST, "outside the block nothing is shared"


def test_no_more_is_kept_than_may_be(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    size = States.of(sd1, FIRST[:1]).hidden.nbytes
    monkeypatch.setattr(states, "MOST_KEPT", 2 * size)
    with states.shared():
        first = States.of(sd1, FIRST)
        assert len(states._SHELF.get().rows) == 2
        assert same(first, States.of(sd1, FIRST))


def test_another_base_shares_nothing(sd1: Base, sd2: Base) -> None:
    with states.shared():
        one, other = States.of(sd1, FIRST), States.of(sd2, FIRST)
    assert same(other, States.of(sd2, FIRST)) and one.hidden.shape == States.of(sd1, FIRST).hidden.shape


def test_what_rests_on_base_prompts_and_seed_alone_is_made_once_and_is_the_same(sd1: Base) -> None:
    """Trajectories of one concept, whichever method asks; none where edits are on the base."""
    asked: list[str] = []

    class Told(Report):
        def count(self, items: Iterable, total: int, what: str) -> Iterator:
            asked.append(what)
            return iter(items)

    def latents(seed: int = 0) -> Tensor:
        return objectives.partial_sampling(sd1, ["a cat", "van gogh"], seed, Told())[0]

    alone = latents()
    with states.shared():
        first, second, other = latents(), latents(), latents(1)
        with installed(sd1, [some.shared(sd1)]):
            changed = latents()
    assert alone.equal(first) and first.equal(second) and not first.equal(other) and not first.equal(changed)
    assert len(asked) == 4
