"""The optimisation loop: groups, terms, divergence, memory; stopped and whole runs are equal."""

from __future__ import annotations

import math
import signal

import pytest
import torch
from torch import nn

from conceptzap.errors import MismatchError, ResourceError, UsageError
from conceptzap.training.session import Session
from conceptzap.training.train import Event, Group, train

STEPS = 12
OOM = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"


class Toy:
    """Two groups that take turns, as an alternating method has them, on a net of two layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.spare = nn.Parameter(torch.ones(3))

    def groups(self) -> dict[str, Group]:
        first, second = self.net[0], self.net[2]
        return {
            "key": Group({"w": first.weight, "b": first.bias}, lr=1e-2, clip=0.1),
            "erase": Group({"w": second.weight, "spare": self.spare}, lr=3e-3, betas=(0.8, 0.99)),
        }

    def losses(self, step: int, part: int, parts: int):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 + step))
        rows = batch.chunk(parts)[part]
        group = "key" if step % 3 else "erase"
        yield "fit", (self.net(rows) - rows).square().mean() / parts, group
        if step % 2:
            yield "small", self.net(rows).abs().mean() / parts, group

    def values(self) -> list[torch.Tensor]:
        return [*self.net.state_dict().values(), self.spare.detach()]


def run(toy: Toy, session: Session | None = None, steps: int = STEPS) -> list[Event]:
    return list(train(toy.groups(), toy.losses, steps=steps, batch=8, session=session))


def same(one: Toy, other: Toy) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.fixture(scope="module")
def whole() -> Toy:
    toy = Toy()
    run(toy)
    return toy


def test_events_count_the_steps_and_carry_the_terms():
    events = run(Toy())
    assert [event.step for event in events] == list(range(1, STEPS + 1))
    assert {event.total for event in events} == {STEPS}
    assert [set(event.terms) for event in events[:2]] == [{"fit"}, {"fit", "small"}]
    assert all(math.isfinite(value) for event in events for value in event.terms.values())
    assert all(a.seconds <= b.seconds for a, b in zip(events, events[1:], strict=False))


def test_a_loss_changes_its_own_group_only():
    toy = Toy()
    events = train(toy.groups(), toy.losses, steps=STEPS)
    start = [value.clone() for value in toy.values()]
    next(events)
    changed = [not torch.equal(a, b) for a, b in zip(start, toy.values(), strict=True)]
    assert changed == [False, False, True, False, False]


def test_losses_of_one_group_add_up():
    def twice(step, part, parts):
        yield "a", parameter.sum(), "g"
        yield "b", (2 * parameter).sum(), "g"

    def once(step, part, parts):
        yield "c", (3 * parameter).sum(), "g"

    ends = []
    for losses in (twice, once):
        parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
        list(train({"g": Group({"p": parameter}, lr=0.1)}, losses, steps=3))
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_the_first_step_is_adams():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))

    def losses(step, part, parts):
        yield "square", parameter.square().sum(), "g"

    list(train({"g": Group({"p": parameter}, lr=0.5)}, losses, steps=1))
    # with bias correction the first update is lr * sign(gradient), up to Adam's epsilon
    assert torch.allclose(parameter.detach(), torch.tensor([0.5, -1.5]), atol=1e-6)


def test_clip_bounds_the_gradient():
    seen = []

    def losses(step, part, parts):
        if step:
            seen.append(parameter.item())
        yield "steep", 1000 * parameter.sum(), "g"

    parameter = nn.Parameter(torch.tensor([0.0]))
    groups = {"g": Group({"p": parameter}, lr=1e-8, clip=1e-8)}
    list(train(groups, losses, steps=2))
    # a gradient as small as Adam's epsilon halves the step; the unclipped one would not
    assert seen[0] == pytest.approx(-0.5e-8, rel=1e-3)


def test_backward_runs_while_the_losses_are_suspended():
    log = []

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            log.append("backward")
            return gradient

    def losses(step, part, parts):
        log.append("attached")
        yield "a", Told.apply(parameter).sum(), "g"
        log.append("removed")

    parameter = nn.Parameter(torch.ones(1))
    list(train({"g": Group({"p": parameter}, lr=0.1)}, losses, steps=1))
    assert log == ["attached", "backward", "removed"]


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_a_usage_error_before_anything_runs(steps):
    with pytest.raises(UsageError, match="out of range"):
        train({}, lambda *_: pytest.fail("called"), steps=steps)


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}]
    + [{"lr": 1.0, "betas": (0.9, 1.0)}, {"lr": 1.0, "clip": 0.0}, {"lr": 1.0, "clip": math.nan}],
)
def test_settings_out_of_range_are_usage_errors(settings):
    with pytest.raises(UsageError, match="out of range"):
        Group({}, **settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_state_before(tmp_path, bad):
    def poisoned(step, part, parts):
        for name, loss, group in toy.losses(step, part, parts):
            yield name, loss * (bad if step == 5 and name == "small" else 1), group

    toy, before = Toy(), Toy()
    run(before, steps=5)
    session = Session(tmp_path / "run", {})
    with pytest.raises(ResourceError, match=r"'small' is (nan|inf) at step 6") as caught:
        list(train(toy.groups(), poisoned, steps=STEPS, session=session))
    assert (caught.value.exit_code, caught.value.hint) == (5, "lower lr")
    assert same(toy, before)
    assert session.resume == 5


def test_a_gradient_that_is_not_finite_never_reaches_the_parameters(tmp_path):
    def losses(step, part, parts):
        yield "root", parameter.sqrt().sum(), "g"

    parameter = nn.Parameter(torch.zeros(2))
    session = Session(tmp_path / "run", {})
    with pytest.raises(ResourceError, match="gradient of 'g' is (nan|inf) at step 1"):
        list(train({"g": Group({"p": parameter}, lr=0.1)}, losses, steps=3, session=session))
    assert torch.equal(parameter.detach(), torch.zeros(2))


def test_a_broken_state_does_not_take_the_place_of_a_good_one(tmp_path):
    def losses(step, part, parts):
        if step == 3:
            parameter.data.fill_(math.nan)
        yield "square", parameter.square().sum(), "g"

    parameter = nn.Parameter(torch.ones(2))
    session = Session(tmp_path / "run", {}, every_seconds=0)
    with pytest.raises(ResourceError):
        list(train({"g": Group({"p": parameter}, lr=0.1)}, losses, steps=9, session=session))
    assert session.resume == 3
    assert session.restore().tensors["g/p/value"].isfinite().all()


class Scarce:
    """The toy's losses on a machine that runs out of memory `times` times."""

    def __init__(self, toy: Toy, times: int, error: Exception) -> None:
        self.toy, self.times, self.error, self.asked = toy, times, error, []

    def __call__(self, step: int, part: int, parts: int):
        self.asked.append((step, part, parts))
        for item in self.toy.losses(step, part, parts):
            yield item
            if step == 4 and self.times:
                self.times -= 1
                raise self.error


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError(OOM), torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_out_of_memory_is_answered_with_half_batches(error):
    toy, halved = Toy(), Toy()
    losses = Scarce(toy, 1, error)
    list(train(toy.groups(), losses, steps=6, batch=8))
    assert losses.asked[4:] == [(4, 0, 1), (4, 0, 2), (4, 1, 2), (5, 0, 2), (5, 1, 2)]

    def by_hand(step, part, parts):
        for half in range(2 if step >= 4 else 1):
            yield from halved.losses(step, half, 2 if step >= 4 else 1)

    list(train(halved.groups(), by_hand, steps=6))
    assert same(toy, halved)


def test_half_batches_add_up_to_the_whole_batch(whole):
    toy = Toy()
    list(train(toy.groups(), Scarce(toy, 1, MemoryError()), steps=STEPS, batch=8))
    for a, b in zip(toy.values(), whole.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


class Frugal:
    """Notes when it is entered and left."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __enter__(self) -> None:
        self.log.append("entered")

    def __exit__(self, *_: object) -> None:
        self.log.append("left")


def test_the_batch_is_cut_down_to_single_rows_then_activations_are_saved():
    toy, frugal = Toy(), Frugal()
    losses = Scarce(toy, 4, MemoryError())
    list(train(toy.groups(), losses, steps=6, batch=8, frugal=frugal))
    tried = [parts for step, part, parts in losses.asked if step == 4 and part == 0]
    assert tried == [1, 2, 4, 8, 8] and frugal.log == ["entered", "left"]
    assert [parts for step, _, parts in losses.asked if step == 5] == [8] * 8


def test_activations_are_kept_while_memory_lasts():
    toy, frugal = Toy(), Frugal()
    list(train(toy.groups(), Scarce(toy, 3, MemoryError()), steps=6, batch=8, frugal=frugal))
    assert frugal.log == []


def test_out_of_memory_for_a_single_row_says_the_sizes_and_keeps_the_state(tmp_path):
    toy, before, frugal = Toy(), Toy(), Frugal()
    run(before, steps=4)
    session = Session(tmp_path / "run", {})
    losses = Scarce(toy, 5, RuntimeError(OOM))
    asked = {"steps": STEPS, "batch": 8, "frugal": frugal, "session": session}
    with pytest.raises(ResourceError, match="step 5.* 4096 bytes asked for, .* GiB free") as caught:
        list(train(toy.groups(), losses, **asked))
    assert caught.value.exit_code == 5
    assert same(toy, before) and frugal.log == ["entered", "left"]
    assert (session.resume, session.restore().parts) == (4, 8)


def test_out_of_memory_in_the_update_saves_nothing_torn(tmp_path, monkeypatch):
    def scarce(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.Adam, "step", scarce)
    session = Session(tmp_path / "run", {})
    with pytest.raises(ResourceError, match="update of step 1: 2.00 GiB asked for"):
        run(Toy(), session)
    assert session.resume == 0


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def losses(step, part, parts):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        yield

    with pytest.raises(RuntimeError, match="mat1"):
        list(train({"g": Group({"p": nn.Parameter(torch.ones(1))}, lr=1)}, losses, steps=1))


def test_the_half_batches_of_a_run_go_on_when_it_is_taken_up(tmp_path):
    toy, again, through = Toy(), Toy(), Toy()
    list(train(through.groups(), Scarce(through, 1, MemoryError()), steps=STEPS, batch=8))
    first = train(
        toy.groups(),
        Scarce(toy, 1, MemoryError()),
        steps=STEPS,
        batch=8,
        session=Session(tmp_path, {}, "", 0),
    )
    while next(first).step < 8:
        pass
    first.close()
    run(again, Session(tmp_path, {}, "", 0))
    assert same(again, through)


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_a_stopped_and_resumed_run_equals_a_whole_one(tmp_path, whole, stop):
    first, second = Toy(), Toy()
    events = train(first.groups(), first.losses, steps=STEPS, session=Session(tmp_path, {}, "", 0))
    while next(events).step < stop:
        pass
    events.close()
    resumed = run(second, Session(tmp_path, {}))
    assert [event.step for event in resumed] == list(range(stop + 1, STEPS + 1))
    assert same(second, whole)


def test_a_finished_run_is_taken_up_without_a_step(tmp_path, whole):
    run(Toy(), Session(tmp_path, {}))
    again = Toy()
    assert run(again, Session(tmp_path, {})) == []
    assert same(again, whole)


def test_other_parameters_are_refused(tmp_path):
    run(Toy(), Session(tmp_path, {}))
    groups = {"key": Group({"w": nn.Parameter(torch.ones(2))}, lr=1)}
    with pytest.raises(MismatchError, match="other parameters"):
        list(train(groups, Toy().losses, steps=STEPS, session=Session(tmp_path, {})))


def test_resuming_keeps_the_parameters_objects_and_dtypes(tmp_path):
    def losses(step, part, parts):
        yield "a", parameter.float().square().sum(), "g"

    for expected in (4, 0):
        parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16).t())
        group = Group({"p": parameter}, lr=0.1)
        events = list(train({"g": group}, losses, steps=4, session=Session(tmp_path, {})))
        assert len(events) == expected
        assert parameter.dtype is torch.bfloat16 and group.params["p"] is parameter
        assert (parameter < 1).all()


def test_without_a_session_signals_keep_their_meaning():
    before = signal.getsignal(signal.SIGINT)
    events = train(Toy().groups(), Toy().losses, steps=2)
    next(events)
    assert signal.getsignal(signal.SIGINT) is before
