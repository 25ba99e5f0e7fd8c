"""Sockets of this Python, and of every Python it starts, reach this machine and no further.

Whoever has this folder on PYTHONPATH runs this file at its start. An audit hook hears of every call
in the interpreter itself, whatever library makes it, and cannot be taken off again.
"""

from __future__ import annotations

import sys
from typing import Any

HERE = (None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1", b"::1")
# events and where in their arguments the other end stands: a host, or an address that begins with one
REACHES = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}


def stay_here(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise `OSError`, as a machine without a network does, where a call would leave this machine."""
    if event not in REACHES:
        return
    other = arguments[REACHES[event]]
    named = event.startswith("socket.get")
    if not named and not isinstance(other, tuple):
        return  # a Unix socket's path, or a socket that is connected already
    host = other if named else other[0]
    if host not in HERE:
        raise OSError(f"the tests reached for the network: {host!r}")


sys.addaudithook(stay_here)
