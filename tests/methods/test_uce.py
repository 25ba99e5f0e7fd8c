"""UCE: one low-rank pair for all layers; what is kept moves less than what goes."""

from __future__ import annotations

import torch
from small import TASK, edits, lesson

from conceptzap.base import CROSS_KV, Base
from conceptzap.task import Task
from conceptzap.training import closed_form, detector


def test_one_ungated_pair_serves_every_key_and_value(sd1: Base) -> None:
    (edit,) = edits(sd1, "uce", rank=6)
    assert edit.sites == sd1.sites(CROSS_KV) and edit.gates == () and edit.role == "erase"
    assert edit.tensors["into"].shape == (32, 6) and edit.tensors["down"].shape == (6, 32)


def test_concept_states_move_to_the_anchors_and_kept_ones_stay(sd1: Base) -> None:
    (edit,) = edits(sd1, "uce", rank=24)
    told = lesson(sd1)
    source, target, _ = closed_form.aligned_states(sd1, told.pairs, told.concept, told.anchor)
    kept = detector.states(sd1, told.keep).flatten(0, 1)

    def moved(states: torch.Tensor) -> torch.Tensor:
        return states @ edit.tensors["down"].T @ edit.tensors["into"].T

    def rms(x: torch.Tensor) -> float:
        return x.pow(2).mean().sqrt().item()

    assert rms(source + moved(source) - target) < 0.8 * rms(source - target)
    assert rms(moved(kept)) < rms(moved(source))


def test_every_concept_has_its_say(sd1: Base) -> None:
    both = Task(("cat", "house"), ("dog", "castle"), TASK.keep)
    (edit,), (one,) = edits(sd1, "uce", both), edits(sd1, "uce")
    assert not torch.equal(edit.tensors["down"], one.tensors["down"])
