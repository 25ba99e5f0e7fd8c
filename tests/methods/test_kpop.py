"""KPOP: the weights and the key apart, the two orders, and the paper's loss space."""

from __future__ import annotations

import pytest
import torch
from small import TASK, edits, lesson, settings

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.methods import kpop
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import objectives


@pytest.fixture(scope="module")
def made(quick: None, sd1: Base) -> list[Edit]:
    return edits(sd1, "kpop")


def losses(base: Base, **changes) -> tuple[kpop._Losses, list[Edit], Edit]:
    cfg = config.resolve(kpop.Config, settings("kpop", **changes))
    told = [lesson(base)]
    weights = objectives.low_rank(base, cfg.sites, cfg.rank, 0)
    key = kpop._key(base, told, cfg, 0)
    return kpop._Losses(base, told, weights, key, cfg, Report(seed=0)), weights, key


def terms(made: kpop._Losses, step: int) -> list[tuple[str, str]]:
    return [(name, group) for name, _, group in made(step, 0, 1)]


def test_the_key_is_an_edit_of_its_own(sd1: Base, made: list[Edit]) -> None:
    *weights, key = made
    assert {(edit.op, edit.role) for edit in weights} == {("weight", "erase")}
    assert (key.op, key.role) == ("tokens", "key")
    assert set(key.tensors) == {"prompt_k", "prompt_v"} and len(key.gates) == 1
    assert edits(sd1, "kpop", gate=False)[-1].gates == ()


def test_steps_alternate_each_with_its_own_parameters(sd1: Base) -> None:
    made, *_ = losses(sd1)
    assert terms(made, 1) == [("transfer", "prompt")]
    names = [("remove", "weights"), ("with prompt", "weights"), ("retain", "weights")]
    assert terms(made, 0) == terms(made, 2) == names


def test_sequential_removes_first_and_fits_the_key_afterwards(sd1: Base) -> None:
    made, *_ = losses(sd1, order="sequential", steps=4)
    assert [made.removes(step) for step in range(4)] == [True, True, False, False]
    with pytest.raises(UsageError, match="unknown order"):
        edits(sd1, "kpop", order="backwards")


def test_the_first_loss_of_the_transfer_is_what_the_definition_says(sd1: Base) -> None:
    """Fresh weights change nothing and the key is off: removal starts at |eps_c - target|^2."""
    made, *_ = losses(sd1, eta=1.0, with_prompt=0.0, retain=0.0)
    ((name, loss, _),) = made(0, 0, 1)
    batch = made.forget.draw(objectives.step_generator(0, 0), 2)
    given, instead = (sd1.eps(batch.x, batch.t, c) for c in (batch.concept, batch.anchor))
    wanted = (given - (instead - (given - instead))).pow(2).mean()
    assert name == "remove" and torch.isclose(loss, wanted, rtol=1e-4)


def test_x0_space_weighs_by_the_noise_over_the_signal(sd1: Base) -> None:
    generator = torch.Generator().manual_seed(0)
    eps, target, x = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    t = torch.tensor([20, 900])
    alpha = sd1.alphas[t].view(-1, 1, 1, 1)
    x0 = [(x - (1 - alpha).sqrt() * e) / alpha.sqrt() for e in (eps, target)]
    found = objectives.distance(sd1, eps, target, t, "x0")
    assert torch.isclose(found, (x0[0] - x0[1]).pow(2).mean(), rtol=1e-4)
    with pytest.raises(UsageError, match="unknown loss space"):
        edits(sd1, "kpop", space="y")
    assert edits(sd1, "kpop", space="x0")


def test_an_empty_anchor_is_the_empty_prompt(sd1: Base, made: list[Edit]) -> None:
    empty = Task(TASK.concepts, ("",), TASK.keep)
    assert set(lesson(sd1, empty).anchors) == {""}
    assert [edit.op for edit in edits(sd1, "kpop", empty)] == [edit.op for edit in made]


@pytest.mark.parametrize(
    ("placement", "kinds"), [("mid", {"mid_block"}), ("midout", {"mid_block", "up_blocks"})]
)
def test_the_prompt_stands_where_it_was_placed(sd1: Base, placement: str, kinds: set[str]) -> None:
    _, _, key = losses(sd1, placement=placement)
    assert {site.split(".")[1] for site in key.sites} == kinds
    with pytest.raises(UsageError, match="unknown placement"):
        losses(sd1, placement="nowhere")
