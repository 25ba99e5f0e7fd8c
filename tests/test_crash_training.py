"""`kill -9` at random moments of a training: the next run takes it up, to the same last bit.

Children are forked from this process, where torch is already loaded, so a kill costs milliseconds.
`CONCEPTZAP_KILLS=100` asks for more of them than the 20 of every day.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
import torch

from conceptzap.session import Session
from tests.test_train import Toy, run, same

KILLS = int(os.environ.get("CONCEPTZAP_KILLS", "20"))
STEPS = 60
CONFIG = {"lr": 0.1}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork does not take the others along
    yield
    torch.set_num_threads(threads)


def killed(folder, seconds: float) -> bool:
    """Train in a child that is killed after `seconds`; False if it was done before."""
    child = os.fork()
    if not child:
        failed = 1
        try:
            run(Toy(), Session(folder, CONFIG, every_seconds=0), STEPS)
            failed = 0
        finally:
            os._exit(failed)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork: kills are not tested here")
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, one_thread):
    whole, last = Toy(), Toy()
    run(whole, steps=STEPS)
    moments = random.Random(0)
    reached, kills = [], 0
    while kills < KILLS:
        kills += killed(tmp_path, moments.uniform(0.0, 0.15))
        # whatever can be seen is whole: a damaged checkpoint would be warned about
        reached.append(Session(tmp_path, CONFIG, warn=pytest.fail).resume)
        assert all(len(list(seen.iterdir())) == 3 for seen in tmp_path.glob("step-*"))
        if reached[-1] == STEPS:
            shutil.rmtree(tmp_path)
    assert any(0 < step < STEPS for step in reached), "no kill fell into the training"
    run(last, Session(tmp_path, CONFIG, warn=pytest.fail), STEPS)
    assert same(whole, last)
    assert not list(tmp_path.glob(".step-*"))
