"""Full disks, read-only disks and folders without permission, as real as this machine allows.

Root may write everywhere, so permissions are tried by a child that is nobody. What cannot be set up
here is skipped with a line that says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conceptzap.errors import ConceptZapError, ResourceError
from conceptzap.format.atomic import check_writable, read_regular, write_atomic

OLD, NEW = b"the old one", b"the new one, whole"
NOBODY = 65534


def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """The folder with something mounted on it; the test is skipped where that is forbidden."""
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SKIPPED, NOT TESTED: this machine forbids mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    if not shutil.which("mount"):
        pytest.skip("SKIPPED, NOT TESTED: there is no mount command for a full disk")
    yield from mounted(tmp_path, "-t", "tmpfs", "-o", "size=256k", "tmpfs")


def test_full_disk(tiny_disk):
    path = tiny_disk / "a"
    write_atomic(path, OLD)
    with pytest.raises(ResourceError, match="no space for .*: 1000000 bytes needed, [0-9]+ free"):
        write_atomic(path, bytes(1_000_000), force=True)
    assert os.listdir(tiny_disk) == ["a"] and path.read_bytes() == OLD
    check_writable(tiny_disk / "b")
    (tiny_disk / "filler").write_bytes(bytes(220_000))
    with pytest.raises(ResourceError, match="no space"):
        check_writable(tiny_disk / "b")
    assert sorted(os.listdir(tiny_disk)) == ["a", "filler"]


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    if not shutil.which("mount"):
        pytest.skip("SKIPPED, NOT TESTED: there is no mount command for a read-only disk")
    yield from mounted(tmp_path, "-t", "tmpfs", "-o", "ro", "tmpfs")


def test_read_only_disk(read_only_disk):
    for attempt in (lambda p: write_atomic(p, NEW), check_writable):
        with pytest.raises(ResourceError, match="Read-only file system"):
            attempt(read_only_disk / "a")


def as_nobody(action: Callable[[], None]) -> str:
    """What `action` raises in a child without root's power to write anywhere ("" for nothing)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            action()
        except ConceptZapError as error:
            os.write(write, f"{error.exit_code} {error}".encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as pipe:
        return pipe.read().decode()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


def nobody_or_skip() -> None:
    if os.getuid() != 0:
        pytest.skip("SKIPPED, NOT TESTED: only root can become somebody without permission")


def test_folder_without_permission(shared):
    nobody_or_skip()
    path = shared / "a"
    assert as_nobody(lambda: write_atomic(path, OLD)) == ""  # the control: here it may
    shared.chmod(0o555)
    for attempt in (
        lambda: write_atomic(path, NEW, force=True),
        lambda: check_writable(path, force=True),
        lambda: write_atomic(shared / "b", NEW),
    ):
        assert as_nobody(attempt) == f"5 cannot write in {shared}: Permission denied"
    assert os.listdir(shared) == ["a"] and path.read_bytes() == OLD


def test_folder_that_cannot_be_entered(shared):
    nobody_or_skip()
    (shared / "closed").mkdir(mode=0o700)
    told = as_nobody(lambda: check_writable(shared / "closed" / "a"))
    assert told == f"5 cannot write in {shared}/closed: Permission denied"


def test_file_that_cannot_be_read(shared):
    nobody_or_skip()
    (shared / "a").write_bytes(OLD)
    (shared / "a").chmod(0o600)
    told = as_nobody(lambda: read_regular(shared / "a", 100) and None)
    assert told == f"3 cannot read {shared}/a: Permission denied"
