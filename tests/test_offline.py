"""No test reaches the network, nor does any program that a test starts."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ELSEWHERE = ("192.0.2.1", 443)  # an address that is nobody's (RFC 5737)
CALLS = {
    "connect": "socket.socket().connect({})",
    "connect_ex": "socket.socket().connect_ex({})",
    "create_connection": "socket.create_connection({}, timeout=1)",
    "sendto": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', {})",
    "the C module": "__import__('_socket').socket().connect({})",
    "getaddrinfo": "socket.getaddrinfo(*{})",
    "gethostbyname": "socket.gethostbyname({}[0])",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_tests_themselves(call: str) -> None:
    with pytest.raises(OSError, match="reached for the network"):
        eval(call.format(ELSEWHERE), {"socket": socket})


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_program_that_a_test_starts(call: str) -> None:
    done = python(f"import socket; {call.format(ELSEWHERE)}")
    assert done.returncode == 1 and "OSError: the tests reached for the network" in done.stderr


def test_a_program_that_such_a_program_starts() -> None:
    inner = f"import socket; socket.create_connection({ELSEWHERE})"
    done = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])")
    assert "reached for the network" in done.stderr


def test_this_machine_can_be_reached() -> None:
    """So it is the guard that stops the others, not a Python without sockets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = python(f"import socket; socket.create_connection(('localhost', {port}))")
    assert done.returncode == 0, done.stderr


def test_no_test_takes_the_guard_off_its_children() -> None:
    """Whoever gives a program another PYTHONPATH hands on the one there is."""
    own = Path(__file__).parent
    for path in sorted(own.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                given = {ast.unparse(k): ast.unparse(v) for k, v in zip(node.keys, node.values) if k}
                wanted = "os.environ['PYTHONPATH']"
                assert given.get("'PYTHONPATH'", wanted) == wanted, f"{path.name}:{node.lineno}"
    assert os.environ["PYTHONPATH"].startswith(str(own / "offline"))
