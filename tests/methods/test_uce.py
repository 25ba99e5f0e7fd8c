"""UCE: one low-rank pair for all layers; what is kept moves less than what goes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small import TASK, edits, lesson

from conceptzap.base import CROSS_KV, Base
from conceptzap.edit import Edit
from conceptzap.runtime.attach import attached
from conceptzap.runtime.gates import Signal, factor
from conceptzap.task import Task


def test_one_ungated_pair_serves_every_key_and_value(sd1: Base) -> None:
    (edit,) = edits(sd1, "uce", rank=6)
    assert edit.sites == sd1.sites(CROSS_KV) and edit.gates == () and edit.role == "erase"
    rank = edit.tensors["down"].shape[0]
    assert rank <= 6 and edit.tensors["into"].shape == (32, rank)


def test_concept_states_move_to_the_anchors_and_kept_ones_stay(sd1: Base) -> None:
    (edit,) = edits(sd1, "uce", rank=24)
    told = lesson(sd1)

    def states(prompts: Sequence[str]) -> torch.Tensor:
        return sd1.encode(prompts).states

    def moved(states: torch.Tensor) -> torch.Tensor:
        return states @ edit.tensors["down"].T @ edit.tensors["into"].T

    def rms(x: torch.Tensor) -> float:
        return x.pow(2).mean().sqrt().item()

    # the end of text and the padding, which line up in prompts of equal length
    source, target = (states(prompts)[:, 20:] for prompts in (told.prompts, told.anchors))
    assert rms(source + moved(source) - target) < 0.8 * rms(source - target)
    assert rms(moved(states(told.keep))) < rms(moved(source))


def test_the_unet_is_never_run(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd1.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    assert edits(sd1, "uce")


def test_every_concept_has_its_say(sd1: Base) -> None:
    both = Task(("cat", "house"), ("dog", "castle"), TASK.keep)
    (edit,), (one,) = edits(sd1, "uce", both), edits(sd1, "uce")
    assert not torch.equal(edit.tensors["down"], one.tensors["down"])


def test_behind_a_gate_each_concept_has_a_pair_of_its_own(sd1: Base) -> None:
    """The same one as without; the gate is open for its concept, shut for the empty prompt."""
    both = Task(("cat", "house"), ("dog", "castle"), TASK.keep)
    made = edits(sd1, "uce", both, gate=True)
    assert len(made) == 2 and [gate.kind for edit in made for gate in edit.gates] == ["match"] * 2
    (alone,), (gated,) = edits(sd1, "uce"), edits(sd1, "uce", gate=True)
    assert all(tensor.equal(gated.tensors[slot]) for slot, tensor in alone.tensors.items())
    signal = Signal(sd1.encode(["a photo of a cat", "", "a photo of a house"]).states, torch.zeros(3))
    opened = [factor(edit, signal).bool().flatten().tolist() for edit in made]
    assert opened[0][:2] == [True, False] and opened[1][1:] == [False, True]


SDXL_TASK = Task(("church",), ("house",), ("horse", "cat"), ("object",))


@pytest.mark.parametrize("prompt", ["a photo of a {}", "a {}"])
def test_in_sdxl_the_pooled_text_is_moved_too(sdxl: Base, prompt: str) -> None:
    """Where little is kept, what is left of the way to the anchor's noise; without it, nearly all is."""
    light = {"rank": 64, "ridge": 1e-3, "keep_scale": 0.1}
    made = edits(sdxl, "uce", SDXL_TASK, **light)
    concept, anchor = (prompt.format(noun) for noun in ("church", "house"))

    def noise(text: str, some: Sequence[Edit] = ()) -> torch.Tensor:
        with torch.no_grad(), attached(sdxl.unet, some):
            return sdxl.eps(sdxl.noise([1]), 500, sdxl.encode([text]))

    target = noise(anchor)
    whole = (noise(concept) - target).norm()
    assert (noise(concept, made) - target).norm() <= 0.11 * whole
    assert (noise(concept, made[:1]) - target).norm() > 0.5 * whole
    usual = edits(sdxl, "uce", SDXL_TASK)
    assert (noise(concept, usual) - target).norm() <= 0.5 * whole
