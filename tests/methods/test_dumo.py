"""DuMo: erasers in the skip connections alone, and a modulation that is one number a layer and timestep."""

from __future__ import annotations

import pytest
import torch
from small import TASK, edits, settings

from conceptzap.base import Base
from conceptzap.methods import dumo
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training import distil


def test_every_skip_connection_is_found(base: Base) -> None:
    """As many as the encoder leaves, of its widths, the last one first."""
    left: list[int] = []
    down = base.unet.down_blocks
    handles = [
        base.unet.conv_in.register_forward_hook(lambda m, a, out: left.append(out.shape[1])),
        *(
            block.register_forward_hook(lambda m, a, out: left.extend(x.shape[1] for x in out[1]))
            for block in down
        ),
    ]
    with torch.no_grad():
        base.eps(base.noise([0]), 500, base.encode(["a cat"]))
    for handle in handles:
        handle.remove()
    assert list(dumo.skips(base).values()) == left[::-1]


def test_only_skips_and_the_middle_are_written(sd1: Base) -> None:
    made = edits(sd1, "dumo", rank=2)
    layers = dumo.skips(sd1)
    assert [edit.sites[0] for edit in made] == [*layers, "unet.mid_block"]
    for edit in made:
        up, skip = edit.tensors["up"], layers.get(edit.sites[0])
        if skip is not None:
            assert edit.params["writes"] == "x" and not up[: len(up) - skip].any()
            assert up[len(up) - skip :].any()
    assert {gate.kind for edit in made for gate in edit.gates} == {"similar"}


def test_the_modulation_is_trained_after_the_eraser_and_is_alike_for_its_features(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, optimise = [], distil.optimise

    def watch(base, task, cfg, report, groups, *rest) -> None:
        params = groups["weights"].params
        before = {name: p.detach().clone() for name, p in params.items()}
        optimise(base, task, cfg, report, groups, *rest)
        trained.append({name for name, p in params.items() if not p.equal(before[name])})

    monkeypatch.setattr(distil, "optimise", watch)
    cfg = config.resolve(dumo.Config, settings("dumo", rank=3, modulating=3))
    made = list(dumo.erase(sd1, TASK, cfg, Report(seed=0)))
    assert {name.partition(".")[2] for name in trained[0]} == {"up", "down"}
    assert {name.partition(".")[2] for name in trained[1]} == {"gain"}
    for edit in made:
        gain = edit.tensors["gain"]
        assert gain.shape == (20, 3) and torch.allclose(gain, gain[:, :1].expand_as(gain), atol=1e-6)
        assert edit.tensors["times"].tolist() == [25.0 + 50 * k for k in range(20)]
