"""Checkpoints on disk and signals: what is written, what is refused, what a stop leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conceptzap.errors import Interrupted, MismatchError, ResourceError
from conceptzap.training.session import KEEP, Session, State
from conceptzap.training.train import train
from tests.test_train import STEPS, Toy, run, same

CONFIG = {"lr": 0.1, "keep": ["dog", "cat"], "base": {"id": "demo"}, "name": "Van Gogh"}


def state(step: int) -> State:
    return State(step, 1, {"g/p/value": torch.full((3,), float(step))})


def saved(folder: Path, *steps: int, config: dict = CONFIG, **more) -> Session:
    session = Session(folder, config, **more)
    with session.running():
        session.restore()
        for step in steps:
            session.save(state(step))
    return session


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_state_meta_and_mark(tmp_path):
    saved(tmp_path, 120)
    assert names(tmp_path) == ["step-000120"]
    assert names(tmp_path / "step-000120") == ["DONE", "meta.json", "state.safetensors"]
    meta = json.loads((tmp_path / "step-000120/meta.json").read_text())
    assert (meta["step"], meta["config"]) == (120, CONFIG)
    assert torch.equal(
        load_file(tmp_path / "step-000120/state.safetensors")["g/p/value"], torch.full((3,), 120.0)
    )


def test_the_two_newest_are_kept(tmp_path):
    saved(tmp_path, 8, 9, 10, 1000000)
    assert names(tmp_path) == ["step-000010", "step-1000000"]
    assert Session(tmp_path, CONFIG).resume == 1000000
    saved(tmp_path, 1000001)
    assert names(tmp_path) == ["step-1000000", "step-1000001"]


def test_nothing_saved_is_step_0(tmp_path):
    assert Session(tmp_path / "none", CONFIG).resume == 0
    assert not (tmp_path / "none").exists()


DAMAGE = {
    "no mark": lambda path: (path / "DONE").unlink(),
    "empty mark": lambda path: (path / "DONE").write_bytes(b""),
    "no state": lambda path: (path / "state.safetensors").unlink(),
    "cut state": lambda path: os.truncate(path / "state.safetensors", 40),
    "flipped state": lambda path: flip(path / "state.safetensors"),
    "flipped meta": lambda path: flip(path / "meta.json"),
    "no meta": lambda path: (path / "meta.json").unlink(),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    saved(tmp_path, 10, 20)
    DAMAGE[damage](tmp_path / "step-000020")
    warnings: list[str] = []
    session = Session(tmp_path, CONFIG, warn=warnings.append)
    assert torch.equal(session.restore().tensors["g/p/value"], state(10).tensors["g/p/value"])
    assert len(warnings) == 1 and "step-000020" in warnings[0] and "\n" not in warnings[0]


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "a file"])
def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path, damage):
    saved(tmp_path, 10, 20)
    DAMAGE[damage](tmp_path / "step-000020")
    saved(tmp_path, 15, 20)
    assert names(tmp_path) == ["step-000015", "step-000020"]
    assert Session(tmp_path, CONFIG, warn=pytest.fail).resume == 20


def test_a_damaged_newer_checkpoint_does_not_outlive_sound_ones(tmp_path):
    saved(tmp_path, 10, 90)
    DAMAGE["no mark"](tmp_path / "step-000090")
    saved(tmp_path, 11, 12, 13)
    assert names(tmp_path) == ["step-000012", "step-000013"]


def test_all_damaged_is_step_0(tmp_path):
    saved(tmp_path, 10, 20)
    for path in tmp_path.iterdir():
        DAMAGE["flipped state"](path)
    assert Session(tmp_path, CONFIG).resume == 0


def test_every_byte_of_a_checkpoint_is_guarded(tmp_path):
    saved(tmp_path, 1)
    for file in sorted((tmp_path / "step-000001").iterdir()):
        good = file.read_bytes()
        for index in range(len(good)):
            file.write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
            assert Session(tmp_path, CONFIG).resume == 0, (file.name, index)
        file.write_bytes(good)
    assert Session(tmp_path, CONFIG).resume == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr": 0.2}, "lr (0.1, now 0.2)"),
        ({"keep": ["dog", "cow"]}, 'keep.1 ("cat", now "cow")'),
        ({"base": {"id": "x"}}, 'base.id ("demo", now "x")'),
        ({"new": None}, "new (absent, now null)"),
        ({"lr": 1, "name": "church"}, 'lr (0.1, now 1), name ("Van Gogh", now "church")'),
    ],
)
def test_another_config_is_refused_by_the_names_that_differ(tmp_path, change, told):
    saved(tmp_path, 10)
    with pytest.raises(MismatchError) as caught:
        saved(tmp_path, 20, config=CONFIG | change)
    assert told in str(caught.value) and caught.value.exit_code == 4 and caught.value.hint
    assert names(tmp_path) == ["step-000010"]


def test_a_config_of_tuples_equals_its_json(tmp_path):
    saved(tmp_path, 10, config={"betas": (0.9, 0.99), "inner": {"a": ()}})
    assert Session(tmp_path, {"inner": {"a": []}, "betas": [0.9, 0.99]}).resume == 10


def test_due_after_the_given_time(tmp_path):
    assert Session(tmp_path, {}, every_seconds=0).due()
    assert not Session(tmp_path, {}, every_seconds=60).due()


def test_clear_removes_what_is_ours_only(tmp_path):
    folder = tmp_path / "run"
    session = saved(folder, 1, 2)
    (folder / ".step-abc").mkdir()
    (folder / "notes.txt").write_text("mine")
    session.clear()
    assert names(folder) == ["notes.txt"]
    (folder / "notes.txt").unlink()
    session.clear()
    assert not folder.exists()
    session.clear()


def test_leftovers_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / ".step-killed").mkdir()
    (tmp_path / ".step-killed/state.safetensors").write_bytes(b"half")
    saved(tmp_path, 1)
    assert names(tmp_path) == ["step-000001"]


def test_a_second_run_in_the_same_folder_is_told_so(tmp_path):
    with Session(tmp_path, CONFIG).running():
        with pytest.raises(ResourceError, match="another run is training"):
            with Session(tmp_path, CONFIG).running():
                pytest.fail("both ran")
    saved(tmp_path, 1)


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    session = saved(tmp_path, 10)

    def full(_descriptor: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ResourceError, match="space") as caught:
            session.save(state(20))
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-000010"]
    assert Session(tmp_path, CONFIG, warn=pytest.fail).resume == 10


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot keep a checkpoint"):
        saved(tmp_path / "file/run", 1)


def interrupted_at(step: int, signum: int, toy: Toy, session: Session) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        for event in train(toy.groups(), toy.losses, steps=STEPS, session=session):
            if event.step == step:
                signal.raise_signal(signum)
    return caught.value


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 7, STEPS])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, signum, step):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    command = "conceptzap erase 'Van Gogh' --resume"
    error = interrupted_at(step, signum, Toy(), Session(tmp_path, CONFIG, command))
    assert error.exit_code == 128 + signum
    assert f"{signal.Signals(signum).name} after step {step} of {STEPS}" in str(error)
    assert command in error.hint
    assert Session(tmp_path, CONFIG).resume == step
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_stopped_again_and_again_equals_a_whole_one(tmp_path):
    whole, last = Toy(), Toy()
    run(whole)
    for step in (3, 4, 9):
        interrupted_at(step, signal.SIGINT, Toy(), Session(tmp_path, CONFIG))
    run(last, Session(tmp_path, CONFIG))
    assert same(whole, last)


def test_a_signal_inside_a_step_lets_the_step_finish(tmp_path):
    def losses(step, part, parts):
        for item in toy.losses(step, part, parts):
            yield item
            if step == 4:
                signal.raise_signal(signal.SIGTERM)

    toy, before = Toy(), Toy()
    run(before, steps=5)
    with pytest.raises(Interrupted, match="after step 5"):
        list(train(toy.groups(), losses, steps=STEPS, session=Session(tmp_path, CONFIG)))
    assert same(toy, before)


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        (signal.SIGINT, signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, signal.SIGINT, KeyboardInterrupt),
        (signal.SIGINT, signal.SIGTERM, SystemExit),
    ],
)
def test_a_second_signal_ends_at_once_with_the_last_checkpoint_whole(
    tmp_path, first, second, error
):
    def losses(step, part, parts):
        yield from toy.losses(step, part, parts)
        if step == 6:
            signal.raise_signal(first)
            signal.raise_signal(second)
            pytest.fail("went on")

    toy, again, whole = Toy(), Toy(), Toy()
    session = Session(tmp_path, CONFIG, every_seconds=0)
    with pytest.raises(error) as caught:
        list(train(toy.groups(), losses, steps=STEPS, session=session))
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Session(tmp_path, CONFIG, warn=pytest.fail).resume == 6
    run(again, Session(tmp_path, CONFIG))
    run(whole)
    assert same(again, whole)


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        toy = Toy()
        for _ in train(toy.groups(), toy.losses, steps=3, session=Session(tmp_path, CONFIG)):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_trains_without_handlers(tmp_path):
    failures: list[BaseException] = []

    def work() -> None:
        try:
            run(Toy(), Session(tmp_path, CONFIG))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert Session(tmp_path, CONFIG).resume == STEPS


def test_a_training_keeps_two(tmp_path):
    run(Toy(), Session(tmp_path, CONFIG, every_seconds=0))
    assert names(tmp_path) == [f"step-{step:06d}" for step in range(STEPS - KEEP + 1, STEPS + 1)]
