"""The recipe's training loop: an interrupted run ends as an uninterrupted one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from conceptzap.demo.recipe import training
from conceptzap.demo.recipe.training import Recipe, checkpoints, fit, load_average

RECIPE = Recipe("toy", steps=20, lr=1e-2, seed=3, warmup=2)


class _Stop(Exception):
    pass


def _loss(net: nn.Module, stop_at: int = -1):
    def loss(step: int):
        if step == stop_at:
            raise _Stop
        x = torch.randn(8, 4)
        return {"total": (net(x) - x.sum(1, keepdim=True)).square().mean()}
    return loss


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    net = _net()
    whole = fit(net, _loss(net), RECIPE, tmp_path / "whole")
    broken = _net()
    with pytest.raises(_Stop):
        fit(broken, _loss(broken, stop_at=11), RECIPE, tmp_path / "cut")
    fresh = _net()
    resumed = fit(fresh, _loss(fresh), RECIPE, tmp_path / "cut")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert len(checkpoints(tmp_path / "cut")) == 2


def test_damaged_newest_checkpoint_falls_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    net = _net()
    fit(net, _loss(net), RECIPE, tmp_path)
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    again = _net()
    resumed = fit(again, _loss(again), RECIPE, tmp_path)
    for key, value in net.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_infinite_loss_stops_with_the_last_good_state(tmp_path) -> None:
    net = _net()
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(net, lambda step: {"total": next(net.parameters()).sum() * float("inf")},
            RECIPE, tmp_path)
    assert not checkpoints(tmp_path)


def test_average_is_what_is_loaded(tmp_path) -> None:
    net = _net()
    trained = fit(net, _loss(net), RECIPE, tmp_path)
    other = _net()
    assert load_average(other, tmp_path) == RECIPE.steps
    for key, value in trained.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_a_unet_beside_the_shipped_vae_needs_no_judges_and_no_vae_of_its_own(tmp_path, monkeypatch) -> None:
    recipe = pytest.importorskip("conceptzap.demo.recipe.build", reason="needs the demo extra")

    few = recipe.render.catalogue()[::250][:64]  # 48 are drawn a step
    monkeypatch.setattr(recipe.render, "catalogue", lambda: few)
    pictures = np.random.default_rng(0).integers(0, 255, (len(few), 64, 64, 3), np.uint8)
    np.save(tmp_path / "renders.npy", pictures)
    build = recipe.Build(tmp_path, tmp_path, torch.device("cpu"), few[0].object, 1, shipped_vae=True)
    for stage in ("render", "judges", "vae", "unet", "package"):
        getattr(build, stage)()
    made = build.work / f"checkpoint-without-{few[0].object}"
    shipped = recipe.AutoencoderKL.from_pretrained(recipe.DEMO_FOLDER, subfolder="vae").state_dict()
    ours = recipe.AutoencoderKL.from_pretrained(made, subfolder="vae").state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in ours.items())
    assert {path.name for path in tmp_path.iterdir()} == {
        "renders.npy", "latents.npy", made.name, f"unet-without-{few[0].object}",
    }  # fmt: skip
