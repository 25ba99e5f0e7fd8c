"""Training in half precision: its gradients are those of fp32, at the size of real pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import Context

import pytest
import small
import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.registry import config, family
from conceptzap.report import Report
from conceptzap.testing import tiny
from conceptzap.training import detector, objectives, states, train

TRAINED = [name for name in family.members("methods") if "steps" in small.settings(name)]
LOOK = 4 * 8 * 8  # numbers in the tiny base's latents


class Stop(Exception):
    """Ends a training once its gradients are known."""


@pytest.fixture(scope="module")
def bases() -> tuple[Base, Base]:
    """The same base in fp32 and in fp16."""
    single, half = tiny("sd1"), tiny("sd1")
    for module in (half.unet, *half.text_encoders, half.vae):
        module.half()
    half.dtype = torch.float16
    return single, half


@pytest.fixture(scope="module")
def shelves(bases: tuple[Base, Base]) -> Iterator[tuple[Context, ...]]:
    """For each base a context in which what it makes of prompts is made once; a gate is soon fitted."""
    contexts = tuple(Context() for _ in bases)
    for one in contexts:
        one.run(states._SHELF.set, states._Shelf())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "STEPS", 40)
        yield contexts


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The gradients of every training's first step that is not a rest, one vector a group."""
    found: list[Tensor] = []

    def update(self: train._Trainer, step: int) -> None:
        learning = [g for g in self.groups.values() if any(p.grad is not None for p in g.params.values())]
        found.extend(torch.cat([p.grad.flatten() for p in group.params.values()]) for group in learning)
        if step or len(learning) == len(self.groups):
            raise Stop

    def latents(base: Base, prompts: list[str], *_: object) -> tuple[Tensor, Tensor]:
        noise = torch.stack([base.noise(range(k, k + len(prompts))) for k in (0, 100)])
        return noise, torch.tensor([800, 300])

    def prompt(*args: object, **rest: object) -> Edit:
        edit = begin(*args, **rest)
        for rows in edit.tensors.values():
            rows.data *= 16
        return edit

    # a random base hardly heeds its text, so that rows of usual size change less than fp16 rounds off
    begin = objectives.prompt
    monkeypatch.setattr(objectives, "prompt", prompt)
    monkeypatch.setattr(train._Trainer, "update", update)
    monkeypatch.setattr(objectives, "partial_sampling", latents)
    yield found


LOW_RANK = objectives.low_rank


def changed(*args: object, **rest: object) -> list[Edit]:
    """`low_rank` edits in the middle of a training: no weight is as it was."""
    edits, generator = LOW_RANK(*args, **rest), torch.Generator().manual_seed(0)
    for edit in edits:
        edit.tensors["up"].data += torch.randn(edit.tensors["up"].shape, generator=generator)
    return edits


def shrunk(loss: Callable[..., Tensor], pixels: int) -> Callable[..., Tensor]:
    """The loss of a real picture is a mean over far more numbers: its gradients are as much smaller."""
    return lambda *given: loss(*given) * LOOK / (4 * (pixels // 8) ** 2)


def alike(wanted: list[Tensor], found: list[Tensor]) -> bool:
    """Of the same direction each, with nothing rounded off."""
    return len(found) == len(wanted) > 0 and all(
        ((rounded == 0) & (exact != 0)).float().mean() < 0.01
        and torch.nn.functional.cosine_similarity(exact, rounded, 0) > 0.999
        for exact, rounded in zip(wanted, found, strict=True)
    )


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_in_half_precision_are_those_of_single(
    name: str, bases: tuple[Base, Base], shelves: tuple[Context, ...], gradients: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    member, distance = family.load("methods", name), objectives.distance
    trained = {"form": "weights"} if hasattr(member.Config, "form") else {}  # its other one learns nothing
    settings = config.resolve(member.Config, small.settings(name, **trained))
    if hasattr(settings, "searches"):  # for what erasing harms: nothing, until a weight has changed
        monkeypatch.setattr(objectives, "low_rank", changed)

    def learn(which: int, pixels: int) -> list[Tensor]:
        gradients.clear()
        monkeypatch.setattr(objectives, "distance", shrunk(distance, pixels))
        with pytest.raises(Stop):
            shelves[which].run(lambda: list(member.erase(bases[which], small.TASK, settings, Report(seed=0))))
        return list(gradients)

    usual = learn(0, 512)
    for pixels in (512, 1024):
        found = learn(1, pixels)
        # where each loss is a mean over the picture, the size changes the length of fp32's alone
        assert alike(usual, found) or alike(learn(0, pixels), found)
