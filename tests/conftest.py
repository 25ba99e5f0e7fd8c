"""Shared fixtures: tiny random bases of every family, the demo, one thread, and no network at all."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# read once, when torch and the hub's client are imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# the cache of this run alone: what an earlier one drew would be taken for what a test asks about
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CONCEPTZAP_CACHE"] = tempfile.mkdtemp(prefix="conceptzap-tests-")

# Python programs that the tests start run this source, and reach the network no more than they do
HERE = Path(__file__).parent
SOURCES = [str(HERE / "offline"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, SOURCES))

# what modules and tests are made of stays: to look through it again and again takes 6 s a collection
gc.disable()

# a shell that starts a job in the background hands on an ignored SIGINT, to subprocesses too
signal.signal(signal.SIGINT, signal.default_int_handler)

import offline.sitecustomize  # noqa: F401  (blocks the sockets of this process)
import pytest

if TYPE_CHECKING:
    from conceptzap.base import Base


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays, and what comes is looked through less often."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Workers are given files by name: by number of tests, the dearest of few tests come last, and to one."""
    config.option.loadscopereorder = False


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["CONCEPTZAP_CACHE"], ignore_errors=True)


# fixtures import what they need: tests without a model start without torch


@pytest.fixture(scope="session")
def sd1() -> Base:
    return _tiny("sd1")


@pytest.fixture(scope="session")
def sd2() -> Base:
    return _tiny("sd2")


@pytest.fixture(scope="session")
def sdxl() -> Base:
    return _tiny("sdxl")


@pytest.fixture(scope="session", params=("sd1", "sd2", "sdxl"))
def base(request: pytest.FixtureRequest) -> Base:
    """Each family in turn."""
    return request.getfixturevalue(request.param)


def _tiny(family: str) -> Base:
    from conceptzap.testing import tiny

    return tiny(family)


@pytest.fixture(scope="session", autouse=True)
def no_line_by_the_clock() -> Iterator[None]:
    """What a log gets every ten seconds comes on a slow machine alone: here tests say when time passes."""
    from conceptzap.terminal import progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LINE_EVERY", 24 * 3600.0)
        yield


SYNC = os.fsync


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """What is written is there for every reader at once; only the power's going would tell, and it stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which knows a handle that is none, too
        yield


@pytest.fixture
def real_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waited for after all: while that lasts, a file is half written for others to see."""
    monkeypatch.setattr(os, "fsync", SYNC)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that every picture of a test is its own."""
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny sd1 as a folder for `--base`."""
    from conceptzap.testing import save_tiny

    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def church(sd1: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure made for it."""
    from erasures import write

    return write(sd1, "church", tmp_path_factory.mktemp("erasure"))


@pytest.fixture(scope="session")
def demo_base() -> Base:
    """The built-in checkpoint."""
    from conceptzap.base import load_base
    from conceptzap.terminal.environment import DEMO, DEMO_UNET

    if not DEMO_UNET.is_file():
        pytest.skip("the built-in checkpoint is not there")
    return load_base(str(DEMO))


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """A checkpoint here is loaded by the first command that names it, and is there for the others."""
    from conceptzap import base

    real, loaded = base.load_base, {}

    def load(name: str, *given: object, **more: object) -> Base:
        if name != "demo" and not os.path.isdir(name):
            return real(name, *given, **more)
        key = os.path.realpath(name), os.path.basename(name), given, tuple(more.items())
        if key not in loaded:
            loaded[key] = real(name, *given, **more)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "load_base", load)
        yield


@pytest.fixture(scope="module")
def few_steps() -> Iterator[None]:
    """`erase` looks at a random base in two steps, learns in three, keeps few prompts: it is noise with more, too."""
    from conceptzap.result import Settings
    from conceptzap.training import objectives
    from conceptzap.training.lessons import Lesson
    from conceptzap.verbs import erasing

    usual, kept = erasing.usual, Lesson.kept
    with pytest.MonkeyPatch.context() as patch:
        few = Settings(steps=2, guidance=2.0)
        patch.setattr(erasing, "usual", lambda base: usual(base) if base.is_demo else few)
        patch.setattr(Lesson, "kept", lambda self, count: kept(self, min(count, 24)))
        patch.setattr(objectives, "DENOISING", 3)
        yield
