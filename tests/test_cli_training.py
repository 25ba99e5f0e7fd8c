"""A training through the real command line: stopped, taken up, diverged, out of memory."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Answer, conceptzap, contents
from test_cli_flow import SUFFIX, trained

from conceptzap.base import Base
from conceptzap.progress import Progress
from conceptzap.testing import save_tiny

SHORT = ("--steps", "3", "--set", "trajectories=2", "--set", "batch=2", "--base", "base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    save_tiny(folder / "base")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def train(name: str, *more: str) -> Answer:
    return conceptzap("erase", "castle", *SHORT, "--method", trained(), "-o", name, *more)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Signals that are still to come, one after the second step of each training."""
    signals: list[int] = []
    real = Progress.progress

    def progress(self: Progress, events: Iterator, label: str = "") -> Iterator:
        for event in real(self, events, label):
            if event.step == 2 and signals:
                os.kill(os.getpid(), signals.pop())
            yield event

    monkeypatch.setattr(Progress, "progress", progress)
    yield signals
    assert not signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_taken_up_it_makes_the_same_bytes(
    signum: int, code: int, here: Path, stopping: list[int]
) -> None:
    name = f"stopped-{code}"
    before = contents(here)
    stopping.append(signum)
    answer = train(name)
    assert answer.code == code and "Traceback" not in answer.err
    line = answer.err.splitlines()[-1]
    assert line.startswith("error: stopped by") and "after step 2 of 3" in line
    left = {path for path in contents(here).keys() - before.keys()}
    assert left and all(path.startswith(f".{name}.training") for path in left), "only checkpoints"

    command = line[line.index("go on with: ") :].removeprefix("go on with: ")
    program, *words = shlex.split(command)
    assert program == "conceptzap" and "--resume" in words
    other = conceptzap(*(word if word != "trajectories=2" else "trajectories=3" for word in words))
    assert other.code == 4 and "trajectories" in other.err.splitlines()[-1]
    resumed = conceptzap(*words)
    assert resumed.code in (0, 7) and "taking up the training at step 2" in resumed.err
    assert not (here / f".{name}.training").exists()

    whole = f"whole-{code}"
    assert train(whole).code == resumed.code
    for suffix in (SUFFIX, f".key{SUFFIX}"):
        assert (here / f"{name}{suffix}").read_bytes() == (here / f"{whole}{suffix}").read_bytes()


def failed(answer: Answer, code: int, message: str) -> None:
    assert answer.code == code and answer.out == "" and "Traceback" not in answer.err, answer
    line = answer.err.splitlines()[-1]
    assert line.startswith("error: ") and message in line, line


def test_a_training_that_diverges_writes_no_erasure(here: Path) -> None:
    before = contents(here)
    failed(train("diverged", "--set", "lr=1e30"), 5, "is nan at step")
    left = contents(here).keys() - before.keys()
    assert all(path.startswith(".diverged.training") for path in left)


def test_a_training_out_of_memory_says_the_sizes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Base.eps

    def eps(self: Base, latents: torch.Tensor, *rest: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory left")
        return real(self, latents, *rest)

    monkeypatch.setattr(Base, "eps", eps)
    before = contents(here)
    failed(train("large"), 5, "memory")
    left = contents(here).keys() - before.keys()
    assert all(path.startswith(".large.training") for path in left)
