"""Shared fixtures: tiny random bases of every family, one thread, and no network at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# read once, when torch and the hub's client are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Python programs that the tests start run this source, and reach the network no more than they do
HERE = Path(__file__).parent
SOURCES = [str(HERE / "offline"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, SOURCES))

# a shell that starts a job in the background hands on an ignored SIGINT, to subprocesses too
signal.signal(signal.SIGINT, signal.default_int_handler)

import offline.sitecustomize  # noqa: F401  (blocks the sockets of this process)
import pytest
import torch
from evaluations import church, demo_base, own_cache, tiny_folder  # noqa: F401

from conceptzap.base import Base
from conceptzap.testing import FAMILIES, tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd1() -> Base:
    return tiny("sd1")


@pytest.fixture(scope="session")
def sd2() -> Base:
    return tiny("sd2")


@pytest.fixture(scope="session")
def sdxl() -> Base:
    return tiny("sdxl")


@pytest.fixture(scope="session", params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Base:
    """Each family in turn."""
    return request.getfixturevalue(request.param)
