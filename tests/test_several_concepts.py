"""Several concepts in one call: each is learned from as much, however many ways there are to ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small import settings
from torch import Tensor

from conceptzap.base import Base
from conceptzap.registry import config, family
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import detector, lessons, objectives
from conceptzap.training.objectives import Trajectories
from conceptzap.training.wordings import Pair
from conceptzap.verbs import preview

TWO = Task(("Van Gogh", "church"), ("painting", "house"), ("Monet", "dog"), ("style", "object"))
ODD = replace(TWO, anchors=("Vermeer", "barn"))  # nothing else is called like these


def drawn(base: Base, prompts: Sequence[str], seed: int, report: Report) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, len(prompts), *base.latent_shape), torch.tensor([500])


def drawing() -> list[str]:
    """Methods that draw pictures of what they take out."""
    members = {name: family.load("methods", name) for name in family.members("methods")}
    return [name for name, one in members.items() if "trajectories" in one.Config.__dataclass_fields__]


class Sampled(Exception):
    """A method has asked for its first trajectories."""


@pytest.mark.parametrize("name", drawing())
def test_no_concept_is_drawn_oftener_than_another(
    sd1: Base, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first set that has two concepts in it; sets of one concept each cannot be uneven."""
    alone: set[int] = set()
    task = ODD if name == "ca" else TWO
    names = task.anchors if name == "ca" else task.concepts  # its pictures are those of the anchors

    def sampling(base: Base, prompts: Sequence[str], *rest: object) -> tuple[Tensor, Tensor]:
        counts = [sum(word.lower() in prompt.lower() for prompt in prompts) for word in names]
        if all(counts):
            raise Sampled(counts)
        alone.update(place for place, count in enumerate(counts) if count)
        return drawn(base, prompts, *rest)

    monkeypatch.setattr(objectives, "partial_sampling", sampling)
    monkeypatch.setattr(detector, "STEPS", 10)  # no gate has to be good
    member = family.load("methods", name)
    forms = {"form": "weights"} if "form" in member.Config.__dataclass_fields__ else {}  # that trains
    chosen = settings(name, trajectories=8, **forms)
    try:
        for _ in member.erase(sd1, task, config.resolve(member.Config, chosen), Report(seed=0)):
            pass
        assert alone == {0, 1}, "each concept's pictures are asked for"
    except Sampled as found:
        assert found.args == ([8, 8],)


def test_each_group_is_drawn_n_times_and_one_alone_as_ever(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "partial_sampling", drawn)
    many = [Pair(f"a red thing {i}", f"a thing {i}") for i in range(30)]
    few = [Pair("a blue thing", "a thing")]
    both = Trajectories.of_each(sd1, [many, few], 6, Report(seed=3))
    alone = Trajectories.of(sd1, many, 6, Report(seed=3))
    assert both.prompts[::2] == alone.prompts and set(both.prompts[1::2]) == {"a blue thing"}
    assert len(both.concept) == len(both.anchor) == 12
    assert torch.equal(both.anchor.states[::2], alone.anchor.states)


def test_what_stays_is_shown_as_what_it_is(demo_base: Base) -> None:
    """A kept object is no artist, and a kept style no thing, where concepts of both kinds go."""
    words = lessons.usual_keep(("style", "object"))
    task = Task(TWO.concepts, TWO.anchors, words, TWO.kinds)
    things = set(lessons.usual_keep(("object",))) - set(lessons.usual_keep(("style",)))
    prompts = preview._kept(demo_base, task, 500)
    assert len(prompts) > 20
    assert not [p for p in prompts for word in things if p.endswith((f"by {word}", f"style of {word}"))]
