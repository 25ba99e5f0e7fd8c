"""Receler: erasers behind cross-attention, an attack that takes turns with them, and what strays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import TASK, edits, settings

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.methods import receler
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.training import distil, objectives


def random_erasers(base: Base) -> list[Edit]:
    made = receler.erasers(base, 3, 0)
    for edit in made:
        torch.nn.init.normal_(edit.tensors["up"], generator=torch.Generator().manual_seed(1))
    return made


def test_an_eraser_stands_behind_every_cross_attention(sd1: Base) -> None:
    made = edits(sd1, "receler")
    assert {edit.op for edit in made} == {"adapter"} and {edit.role for edit in made} == {"erase"}
    assert {site for edit in made for site in edit.sites} == set(sd1.sites(receler.OUTPUT))
    assert len(made) == len(sd1.sites("unet.*.attn2"))


def test_an_eraser_adds_its_bottleneck_of_the_output(sd1: Base) -> None:
    made = random_erasers(sd1)
    (site,) = made[0].sites
    module, seen = sd1.module(site), []
    asked = sd1.noise([0]), 500, sd1.encode(["a cat"])
    with torch.no_grad(), receler.watched(sd1) as outputs, attached(sd1.unet, made):
        handle = module.register_forward_hook(lambda m, a, out: seen.append(out))
        sd1.eps(*asked)
        handle.remove()
    y, up, down = outputs[site], made[0].tensors["up"], made[0].tensors["down"]
    assert torch.allclose(seen[0], y + F.gelu(y @ down.T) @ up.T, atol=1e-5)


def test_strays_are_what_is_added_outside(sd1: Base) -> None:
    made = random_erasers(sd1)
    outputs = {site: torch.ones(2, 64, len(sd1.module(site).weight)) for e in made for site in e.sites}
    inside = torch.zeros(2, 1, 16, 16)
    whole = receler.strays(made, outputs, inside)
    added = [F.gelu(outputs[e.sites[0]] @ e.tensors["down"].T) @ e.tensors["up"].T for e in made]
    assert torch.isclose(whole, torch.stack([one.pow(2).mean() for one in added]).mean())
    inside[:, :, :8] = 1
    assert torch.isclose(receler.strays(made, outputs, inside), whole / 2, rtol=1e-4)
    assert receler.strays(made, outputs, torch.ones_like(inside)) == 0


def test_attack_and_erasers_take_turns(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[list[tuple[str, str]]] = []

    def optimise(base, task, cfg, report, groups, sources, terms, stage="") -> None:
        for step in range(3):
            generator = objectives.step_generator(report.seed, step)
            batches = [source.draw(generator, cfg.batch, 0, 1) for source in sources]
            turns.append([(name, group) for name, _, group in terms(step, *batches)])

    monkeypatch.setattr(distil, "optimise", optimise)
    cfg = config.resolve(receler.Config, settings("receler", attacks=2))
    list(receler.erase(sd1, TASK, cfg, Report(seed=0)))
    assert turns == [
        [("attack", "attack")],
        [("attack", "attack")],
        [("erase", "erasers"), ("retain", "erasers")],
    ]
