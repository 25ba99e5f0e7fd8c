"""Shared fixtures: tiny random bases of every family, one thread, and no network at all."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

# read once, when torch and the hub's client are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# a shell that starts a job in the background hands on an ignored SIGINT, to subprocesses too
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from conceptzap.base import Base
from conceptzap.testing import FAMILIES, tiny

HERE = (None, "", "localhost", "127.0.0.1", "::1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Sockets of this process reach this machine and no further."""

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and address[0] not in HERE:
                raise OSError(f"the tests reached for the network: {address}")
            return call(self, address)

        return connect

    resolve = socket.getaddrinfo

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in HERE:
            raise OSError(f"the tests reached for the network: {host}")
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", look_up)
        yield


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
