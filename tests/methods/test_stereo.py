"""STEREO: the composed target, the stages, and that erasing starts from the base again."""

from __future__ import annotations

import pytest
import torch
from small import TASK, edits, settings

from conceptzap.base import Base
from conceptzap.methods import stereo
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training import distil, objectives


def test_the_target_is_composed_of_anchor_and_all_found_prompts() -> None:
    nothing, anchor, *found = (torch.tensor([value]) for value in (1.0, 3.0, 6.0, 8.0))
    assert stereo.composed(nothing, anchor, found, 1.0).item() == 1 + 2 - 6
    assert stereo.composed(nothing, anchor, found, 0.0).item() == 1


def test_with_the_plain_prompt_alone_and_no_anchor_it_is_esds_target() -> None:
    nothing, concept = torch.tensor([1.0]), torch.tensor([4.0])
    ours = stereo.composed(nothing, nothing, [concept], 0.5)
    assert torch.equal(ours, objectives.negative_guidance(concept, nothing, 0.5))


def test_two_rounds_of_erasing_and_finding_then_once(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, list[str]]] = []
    whole = distil.optimise

    def optimise(base, task, cfg, report, groups, sources, terms, stage="") -> None:
        stages.append((stage, list(groups)))
        whole(base, task, cfg, report, groups, sources, terms, stage)

    monkeypatch.setattr(distil, "optimise", optimise)
    cfg = config.resolve(stereo.Config, settings("stereo", steps=1, rounds=2))
    made = list(stereo.erase(sd1, TASK, cfg, Report(seed=0)))
    assert [stage for stage, _ in stages] == ["erase 0", "find 0", "erase 1", "find 1", "once"]
    assert [groups for _, groups in stages] == [["weights"], ["found"]] * 2 + [["weights"]]
    assert {edit.role for edit in made} == {"erase"} and {edit.op for edit in made} == {"weight"}


def test_without_rounds_it_is_one_training(sd1: Base) -> None:
    assert edits(sd1, "stereo", rounds=0, steps=1)
