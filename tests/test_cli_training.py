"""A training through the real command line: stopped, killed, taken up, diverged, out of memory."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from command import Answer, conceptzap, contents
from safetensors.torch import load_file
from test_cli_flow import SUFFIX, trained

from conceptzap.base import Base
from conceptzap.terminal.progress import Progress
from conceptzap.testing import save_tiny
from conceptzap.training import detector
from conceptzap.training.session import Session

SHORT = ("--steps", "3", "--set", "trajectories=2", "--set", "batch=2", "--no-preview", "--base", "base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    save_tiny(folder / "base")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick(loaded_once: None, few_steps: None) -> Iterator[None]:
    """A gate is soon fitted: here it is the training that counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "STEPS", 15)
        yield


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def train(name: str, *more: str) -> Answer:
    return conceptzap("erase", "castle", *SHORT, "--method", trained(), "-o", name, *more)


class Whole(NamedTuple):
    code: int
    bytes: list[bytes]


def made(name: str) -> list[bytes]:
    """The erasure and its key."""
    return [Path(f"{name}{suffix}").read_bytes() for suffix in (SUFFIX, f".key{SUFFIX}")]


@pytest.fixture(scope="module")
def whole(folder: Path, quick: None) -> Whole:
    """A run that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Whole(train("whole").code, made("whole"))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Signals that are still to come, all of them after the second step of the next training."""
    signals: list[int] = []
    real = Progress.progress

    def progress(self: Progress, events: Iterator, label: str = "") -> Iterator:
        for event in real(self, events, label):
            while event.step == 2 and signals:
                signal.raise_signal(signals.pop(0))
            yield event

    monkeypatch.setattr(Progress, "progress", progress)
    yield signals
    assert not signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_taken_up_it_makes_the_same_bytes(
    signum: int, code: int, whole: Whole, here: Path, stopping: list[int]
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
    taken_up = conceptzap(*words)
    assert "taking up the training at step 2" in taken_up.err
    assert not (here / f".{name}.training").exists()
    assert Whole(taken_up.code, made(name)) == whole


@pytest.fixture
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, where otherwise one is due each minute."""
    monkeypatch.setattr(Session, "due", lambda _: True)


def resumed(name: str, step: int, whole: Whole) -> Answer:
    """The run of that name, taken up at `step`: it makes the bytes of one that was never stopped."""
    answer = train(name, "--resume")
    assert f"taking up the training at step {step}" in answer.err
    assert not Path(f".{name}.training").exists()
    assert Whole(answer.code, made(name)) == whole
    return answer


def kept(folder: Path, name: str, before: dict[str, object]) -> list[str]:
    """The checkpoints of a run that made nothing else."""
    left = sorted(contents(folder).keys() - before.keys())
    assert left and all(path.startswith(f".{name}.training") for path in left), left
    return [path for path in left if Path(path).name.startswith("step-")]


def test_a_second_signal_ends_it_at_once_with_its_checkpoints_whole(
    whole: Whole, here: Path, stopping: list[int], always_due: None
) -> None:
    """The first one asks for a checkpoint of step 2, the second does not wait for it."""
    before = contents(here)
    stopping += [signal.SIGINT, signal.SIGINT]
    answer = train("twice")
    failed(answer, 130, "stopped by SIGINT; the training is kept in .twice.training")
    assert "--resume" in answer.err.splitlines()[-1]
    assert kept(here, "twice", before) == [f".twice.training/1/step-00000{n}" for n in (1, 2)]
    resumed("twice", 2, whole)


def test_killed_it_goes_on_to_the_same_bytes(
    whole: Whole, here: Path, stopping: list[int], always_due: None
) -> None:
    before = contents(here)
    child = os.fork()
    if not child:
        stopping.append(signal.SIGKILL)
        train("killed")
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kept(here, "killed", before) == [f".killed.training/1/step-00000{n}" for n in (1, 2)]
    resumed("killed", 2, whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    whole: Whole, here: Path, stopping: list[int], always_due: None
) -> None:
    stopping.append(signal.SIGTERM)
    assert train("damaged").code == 143
    state = here / ".damaged.training" / "1" / "step-000002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    assert "warning: passed over a damaged checkpoint" in resumed("damaged", 1, whole).err


def test_a_second_run_of_the_same_name_is_told_of_the_first(here: Path) -> None:
    folder = here / ".busy.training" / "1"
    with Session(folder, {}).running():
        before = contents(here)
        failed(train("busy"), 5, "another run is training in .busy.training/1")
        assert contents(here) == before
    folder.rmdir(), folder.parent.rmdir()


def failed(answer: Answer, code: int, message: str) -> None:
    assert answer.code == code and answer.out == "" and "Traceback" not in answer.err, answer
    assert answer.err.count("error: ") == 1
    line = answer.err.splitlines()[-1]
    assert line.startswith("error: ") and message in line, line


def test_a_training_that_diverges_writes_no_erasure(here: Path) -> None:
    before = contents(here)
    failed(train("diverged", "--set", "lr=1e30"), 5, "is nan at step")
    left = contents(here).keys() - before.keys()
    assert all(path.startswith(".diverged.training") for path in left)
    states = [load_file(here / path) for path in left if path.endswith("state.safetensors")]
    assert states and all(value.isfinite().all() for state in states for value in state.values())


def test_a_training_out_of_memory_says_the_sizes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Base.eps

    def eps(self: Base, latents: torch.Tensor, *rest: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            torch.empty(2**60)
        return real(self, latents, *rest)

    monkeypatch.setattr(Base, "eps", eps)
    before = contents(here)
    answer = train("large")
    failed(answer, 5, f"one row at a time too: {4 * 2**60} bytes asked for, ")
    assert "GiB free" in answer.err
    left = contents(here).keys() - before.keys()
    assert all(path.startswith(".large.training") for path in left)
