"""Shared fixtures: tiny random bases of every family, one thread, and no network at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from conceptzap.base import Base
from conceptzap.testing import FAMILIES, tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Sockets of this process reach this machine and no further."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise OSError(f"the tests reached for the network: {address}")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", _resolve)
    yield
    patch.undo()


_getaddrinfo = socket.getaddrinfo


def _resolve(host: object, *args: object, **kwargs: object) -> object:
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        raise OSError(f"the tests reached for the network: {host}")
    return _getaddrinfo(host, *args, **kwargs)


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
