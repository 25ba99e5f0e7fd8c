"""`kill -9` while a file is written, and several writers at once: one sees the old or the new.

Children are forked from this process, where everything is loaded, so a kill costs milliseconds.
`CONCEPTZAP_KILLS=100` asks for more of them than the 20 of every day.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conceptzap import format
from conceptzap.edit import Edit, Erasure
from conceptzap.errors import ConceptZapError, UsageError
from conceptzap.format import atomic
from tests.samples import CROSS, header, tensor

KILLS = int(os.environ.get("CONCEPTZAP_KILLS", "20"))
MOST_KILLS = KILLS + 500  # until one has struck a file half written, which a busy machine makes rare
SECONDS = 2.0
LONGEST_WAIT = 0.02


def erasure(title: str) -> Erasure:
    """Large enough (200 kB) that a kill can strike in the middle of a write."""
    values = {"delta": tensor("F16", 100, 1000)}
    return Erasure(header(title=title), (Edit("weight", (f"{CROSS}.to_k",), values),))


ONE, OTHER = erasure("one"), erasure("the other, which is longer")
DATA = {format.dumps(one) for one in (ONE, OTHER)}


def child(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def write_for_ever(path: Path, *contents: bytes, started: int | None = None) -> None:
    """`started` hears of the first write that is whole: before it there may be nothing to see."""
    while True:
        for data in contents:
            atomic.write_atomic(path, data, force=True)
            if started is not None:
                os.write(started, b"!")
                started = None


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_killed_at_random(tmp_path, real_disk):
    draw, path = random.Random(0), tmp_path / "a.lprompt.safetensors"
    ready, started = os.pipe()
    seen, halfway = set(), 0
    for number in range(MOST_KILLS):
        if number >= KILLS and halfway:
            break
        pid = child(lambda: write_for_ever(path, *DATA, started=started))
        os.read(ready, 1)
        time.sleep(draw.uniform(0, LONGEST_WAIT))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        halfway += bool(leftovers(tmp_path))
        if path.exists():
            seen.add(path.read_bytes())
            format.read_header(path)
    os.close(ready), os.close(started)
    assert seen and seen <= DATA
    assert halfway, "no kill struck while a file was being written"
    format.save(ONE, path, force=True)
    assert not leftovers(tmp_path)


STAGES = ("open", "flock", "fchmod", "write", "fsync", "replace", "link", "unlink", "close")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_killed_at_every_stage(stage, after, force, tmp_path):
    path, old = tmp_path / "a.lprompt.safetensors", format.dumps(ONE)
    if force:
        path.write_bytes(old)
    owner = atomic.fcntl if stage == "flock" else os

    def dies() -> None:
        real = getattr(owner, stage)

        def call(*args: object, **kwargs: object) -> object:
            try:
                return real(*args, **kwargs) if after else None
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, stage, call)
        format.save(OTHER, path, force)

    status = os.waitstatus_to_exitcode(os.waitpid(child(dies), 0)[1])
    unused = {"link": force, "replace": not force, "fchmod": not force}.get(stage, False)
    assert status == (0 if unused else -signal.SIGKILL)
    if path.exists():
        assert path.read_bytes() in DATA
    else:
        assert not force
    format.save(ONE, path, force=True)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == old


def test_two_writers_and_a_reader(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    format.save(ONE, path)
    writers = [child(lambda data=data: write_for_ever(path, data)) for data in DATA]
    seen: dict[bytes, int] = dict.fromkeys(DATA, 0)
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            seen[path.read_bytes()] += 1  # a torn or mixed file is a KeyError
        assert all(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in writers), "a writer failed"
    finally:
        for pid in writers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert all(seen.values()), "the reader should have seen both"
    format.save(ONE, path, force=True)
    assert not leftovers(tmp_path)


def test_of_many_writers_without_force_exactly_one_wins(tmp_path):
    path, count = tmp_path / "a.lprompt.safetensors", 6
    start = time.monotonic() + 0.2
    erasures = [replace(ONE, header=header(title=str(number))) for number in range(count)]

    def write(one: Erasure) -> None:
        data = format.dumps(one)
        time.sleep(max(0.0, start - time.monotonic()))
        try:
            atomic.write_atomic(path, data)
        except UsageError:
            os._exit(2)
        except ConceptZapError:
            os._exit(3)

    children = [child(lambda one=one: write(one)) for one in erasures]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    assert codes == [0] + [2] * (count - 1)
    assert path.read_bytes() in {format.dumps(one) for one in erasures}
    assert os.listdir(tmp_path) == [path.name]
