"""The optimisation loop in half precision: the loss is scaled, and the scale goes with the run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conceptzap.errors import ResourceError
from conceptzap.training.session import Session
from conceptzap.training.train import Group, train


class Half:
    """A loss whose gradient passes fp16 on the way to an fp32 parameter, as edits' do."""

    def __init__(self, size: float) -> None:
        self.parameter = nn.Parameter(torch.linspace(-1, 1, 64))
        self.size, self.asked = size, []

    def __call__(self, step: int, part: int, parts: int):
        self.asked.append(step)
        rows = self.parameter.half()
        yield "tiny", self.size * (rows.float() * torch.linspace(0.1, 2, 64)).sum(), "g"

    def train(self, steps: int = 1, **more) -> torch.Tensor:
        """Adam's second moments, which say what gradients it was given."""
        kept = Session(more.pop("folder"), {}) if "folder" in more else None
        self.group = Group({"p": self.parameter}, lr=1e-3, betas=(0.0, 0.999))
        list(train({"g": self.group}, self, steps=steps, session=kept, **more))
        return self.parameter.detach()


def test_gradients_too_small_for_half_precision_are_not_lost():
    start = torch.linspace(-1, 1, 64)
    lost, held = Half(1e-9).train(), Half(1e-9).train(half=True)
    assert torch.equal(lost, start)  # without a scale nothing is learned
    moved = start - held
    wanted = 1e-3 * (g := 1e-9 * torch.linspace(0.1, 2, 64)) / (g + 1e-8)  # Adam's first step
    assert torch.allclose(moved, wanted, rtol=0.01, atol=2e-7)


def test_where_scaled_gradients_overflow_the_step_is_done_again_at_half_the_scale(tmp_path):
    large, whole = Half(10.0), Half(10.0)
    large.train(3, half=True, folder=tmp_path / "run")
    scale = Session(tmp_path / "run", {}).restore().scale
    # 20 x 2^12 overflows fp16's 65,504 and 20 x 2^11 does not
    assert scale == 2.0**11 and large.asked == [0] * 10 + [1, 2]
    assert torch.allclose(large.parameter, whole.train(3), atol=1e-6)


def test_the_scale_rises_again_and_goes_on_with_a_run_that_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr("conceptzap.training.train.RAISED_EVERY", 4)
    through, cut, again = Half(10.0), Half(10.0), Half(10.0)
    through.train(10, half=True, folder=tmp_path / "a")
    cut.train(5, half=True, folder=tmp_path / "b")
    again.train(10, half=True, folder=tmp_path / "b")
    assert torch.equal(again.parameter, through.parameter)
    assert again.asked == [5, 6, 7, 8, 8, 9] == through.asked[-6:]  # raised after step 8, too high
    scales = [Session(tmp_path / name, {}).restore().scale for name in "ab"]
    assert scales[0] == scales[1] == 2.0**11


def test_a_gradient_that_no_scale_can_help_is_an_error():
    def losses(step, part, parts):
        yield "root", parameter.sqrt().sum(), "g"

    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ResourceError, match="gradient of 'g' is (nan|inf) at step 1"):
        list(train({"g": Group({"p": parameter}, lr=0.1)}, losses, steps=3, half=True))
    assert torch.equal(parameter.detach(), torch.zeros(2))
