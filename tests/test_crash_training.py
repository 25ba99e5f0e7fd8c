"""`kill -9` at random moments of a training: the next run takes it up, to the same last bit.

Children are forked from this process, where torch is already loaded, so a kill costs milliseconds.
`CONCEPTZAP_KILLS=100` asks for more of them than the 20 of every day.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable

import pytest
import torch

from conceptzap.training.session import Session, State
from tests.test_train import Toy, run, same

KILLS = int(os.environ.get("CONCEPTZAP_KILLS", "20"))
STEPS = 32
CONFIG = {"lr": 0.1}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork does not take the others along
    yield
    torch.set_num_threads(threads)


def forked(work: Callable[[], object], seconds: float | None = None) -> bool:
    """Do `work` in a child, killed after `seconds` if given; whether it died of a kill."""
    child = os.fork()
    if not child:
        failed = 1
        try:
            work()
            failed = 0
        finally:
            os._exit(failed)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


def die_before(operation: int) -> None:
    """Kill this process before its `operation`-th touch of the disk from here on."""
    left = [operation]

    def count(event: str, _arguments: object) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")) and event != "os.kill":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_a_save_killed_before_any_of_its_operations_leaves_the_old_or_the_new(tmp_path):
    folder, outcomes = tmp_path / "run", []
    while True:
        session = Session(folder, CONFIG)
        with session.running():
            session.restore()
            for step in (1, 2):
                session.save(State(step, 1, {"g/p/value": torch.zeros(2)}))

        def save(session: Session = session) -> None:
            die_before(len(outcomes))
            session.save(State(3, 1, {"g/p/value": torch.ones(2)}))

        died = forked(save)
        assert all(len(list(seen.iterdir())) == 3 for seen in folder.glob("step-*"))
        outcomes.append(Session(folder, CONFIG, warn=pytest.fail).resume)
        shutil.rmtree(folder)
        if not died:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {2, 3}
    assert len(outcomes) > 10, "the operations are not counted"


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, one_thread):
    def train_on() -> None:
        run(Toy(), Session(tmp_path, CONFIG, every_seconds=0), STEPS)

    whole, last = Toy(), Toy()
    run(whole, steps=STEPS)
    moments = random.Random(0)
    began = time.monotonic()
    assert not forked(train_on)
    longest = (time.monotonic() - began) / 8  # some kills a training, on a machine as busy as it was then
    shutil.rmtree(tmp_path)
    reached, kills = [], 0
    while kills < KILLS or not any(0 < step < STEPS for step in reached):  # until one fell into the training
        kills += forked(train_on, moments.uniform(0.0, longest))
        # whatever can be seen is whole: a damaged checkpoint would be warned about
        reached.append(Session(tmp_path, CONFIG, warn=pytest.fail).resume)
        assert all(len(list(seen.iterdir())) == 3 for seen in tmp_path.glob("step-*"))
        if reached[-1] == STEPS:
            shutil.rmtree(tmp_path)
        longest *= {0: 1.5, STEPS: 0.75}.get(reached[-1], 1.0)  # it was too soon, or too late
    run(last, Session(tmp_path, CONFIG, warn=pytest.fail), STEPS)
    assert same(whole, last)
    assert not list(tmp_path.glob(".step-*"))
