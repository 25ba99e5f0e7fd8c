"""Files are written whole or not at all, with the mode and at the place a user expects."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from conceptzap.errors import FormatError, ResourceError, UsageError, escape
from conceptzap.format import atomic
from conceptzap.format.atomic import check_writable, read_regular, write_atomic

OLD, NEW = b"the old one", b"the new one, whole"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def dead_pid() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


# -- what is printed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain église 🏰", "plain église 🏰"),
        ("red\x1b[31m\x07\x00", "red[31m"),
        ("two\nlines\r\n\tand  more\u2028", "two lines and more"),
        ("\u202egnp.exe\u2066\u200b\ufeff", "gnp.exe"),
        ("\udcff\ud800x", "x"),
        (Path("a/b"), "a/b"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "…"),
    ],
)
def test_escape(text, shown):
    assert escape(text) == shown


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_file_has_the_mode_of_the_umask(force, mask, wanted, tmp_path):
    with umask(mask):
        write_atomic(tmp_path / "a", NEW, force)
    assert (tmp_path / "a").read_bytes() == NEW and mode(tmp_path / "a") == wanted
    assert os.listdir(tmp_path) == ["a"]


def test_replaced_file_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(OLD)
    path.chmod(0o640)
    write_atomic(path, NEW, force=True)
    assert path.read_bytes() == NEW and mode(path) == 0o640


def test_nothing_is_overwritten_without_force(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(OLD)
    for attempt in (lambda: write_atomic(path, NEW), lambda: check_writable(path)):
        with pytest.raises(UsageError, match="a exists") as caught:
            attempt()
        assert caught.value.exit_code == 2 and "--force" in caught.value.hint
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_file_that_appears_meanwhile_is_not_overwritten(links, tmp_path, monkeypatch):
    """Two writers pass the first look; the second is stopped when it gives the name."""
    if not links:
        monkeypatch.setattr(os, "link", raising(errno.EPERM))
    fill = atomic._fill

    def appear(descriptor: int, data: bytes) -> None:
        fill(descriptor, data)
        (tmp_path / "a").write_bytes(OLD)

    monkeypatch.setattr(atomic, "_fill", appear)
    with pytest.raises(UsageError, match="exists"):
        write_atomic(tmp_path / "a", NEW)
    assert (tmp_path / "a").read_bytes() == OLD and os.listdir(tmp_path) == ["a"]


def test_disk_without_links_is_written_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", raising(errno.EOPNOTSUPP))
    write_atomic(tmp_path / "a", NEW)
    assert (tmp_path / "a").read_bytes() == NEW and os.listdir(tmp_path) == ["a"]


def test_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    link.symlink_to(target)
    write_atomic(link, OLD)  # a dangling link: its target is made
    assert target.read_bytes() == OLD
    with pytest.raises(UsageError, match="link exists"):
        write_atomic(link, NEW)
    write_atomic(link, NEW, force=True)
    assert link.is_symlink() and target.read_bytes() == NEW
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert os.listdir(tmp_path / "real") == ["a"]


def test_hard_link_keeps_the_old_content(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    os.link(tmp_path / "a", tmp_path / "b")
    write_atomic(tmp_path / "a", NEW, force=True)
    assert (tmp_path / "b").read_bytes() == OLD


@pytest.mark.parametrize("force", [False, True])
def test_names_that_cannot_be_meant(force, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    Path("file").write_bytes(OLD)
    before = sorted(os.listdir())
    cases = {
        tmp_path: "is a folder",
        "": "is a folder",
        "pipe": "not a regular file",
        "/dev/null": "not a regular file",
        "none/a": "there is no folder",
        "file/a": "cannot write",
        "loop": "cannot write",
        "a\0b": "cannot write",
        "x" * 256: "cannot write",
    }
    for path, message in cases.items():
        for attempt in (lambda p: write_atomic(p, NEW, force), lambda p: check_writable(p, force)):
            with pytest.raises(UsageError, match=message) as caught:
                attempt(path)
            assert caught.value.hint and str(caught.value).isprintable()
    assert sorted(os.listdir()) == before and Path("file").read_bytes() == OLD


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "🏰" * 63, ".hidden", "a b\n\x1b[2J", "-o"])
def test_names_that_are_odd_but_fine(name, tmp_path):
    check_writable(tmp_path / name)
    write_atomic(tmp_path / name, NEW)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == NEW


def test_bytes_that_are_no_utf8_can_be_a_name(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))
    write_atomic(path, NEW)
    assert read_regular(path, 100) == NEW
    with pytest.raises(UsageError, match="a exists"):
        write_atomic(path, NEW)


def test_check_writable_leaves_nothing_and_changes_nothing(tmp_path):
    check_writable(tmp_path / "a")
    assert not os.listdir(tmp_path)
    (tmp_path / "a").write_bytes(OLD)
    check_writable(tmp_path / "a", force=True)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == OLD


# -- when something fails --------------------------------------------------------------------------


def raising(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


FAILURES = {
    "write": (errno.ENOSPC, "no space for .*a: 18 bytes needed, [0-9]+ free"),
    "fsync": (errno.EDQUOT, "no space"),
    "fchmod": (errno.EPERM, "cannot write in"),
    "replace": (errno.EIO, "cannot write in .*: Input/output error"),
    "open": (errno.EROFS, "cannot write in .*: Read-only file system"),
}


@pytest.mark.parametrize("call", FAILURES)
def test_failure_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    number, message = FAILURES[call]
    (tmp_path / "a").write_bytes(OLD)
    monkeypatch.setattr(os, call, raising(number))
    with pytest.raises(ResourceError, match=message) as caught:
        write_atomic(tmp_path / "a", NEW, force=True)
    monkeypatch.undo()
    assert caught.value.exit_code == 5 and caught.value.hint
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == OLD


def test_full_disk_halfway_leaves_nothing(tmp_path, monkeypatch):
    write = os.write
    room = [7]

    def little(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= (written := write(descriptor, data[: room[0]]))
        return written

    monkeypatch.setattr(os, "write", little)
    with pytest.raises(ResourceError, match="no space"):
        write_atomic(tmp_path / "a", NEW)
    assert not os.listdir(tmp_path)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    write_atomic(tmp_path / "a", NEW)
    assert (tmp_path / "a").read_bytes() == NEW


def test_interrupt_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", NEW, force=True)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == OLD


def test_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    sync = os.fsync

    def picky(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    write_atomic(tmp_path / "a", NEW)
    assert (tmp_path / "a").read_bytes() == NEW


def test_data_is_synced_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    calls: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append("fsync folder" if folder else name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "link"):
        watch(name)
    write_atomic(tmp_path / "a", OLD)
    write_atomic(tmp_path / "a", NEW, force=True)
    assert calls == ["fsync", "link", "fsync folder", "fsync", "replace", "fsync folder"]


# -- what a killed writer left ---------------------------------------------------------------------


def test_only_dead_temporaries_of_ours_are_swept(tmp_path):
    dead = dead_pid()
    stale = [f".a.{dead}.0123abcd.tmp", f".other.name.{dead}.ffffffff.tmp"]
    kept = [
        f".a.{os.getpid()}.0123abcd.tmp",  # its writer lives
        f".locked.{dead}.0123abcd.tmp",  # its writer lives elsewhere
        f"a.{dead}.0123abcd.tmp",  # not hidden
        f".a.{dead}.0123abcd.tmp.bak",
        f".a.{dead}.xyz.tmp",
        ".a.tmp",
        "a.lprompt.safetensors",
    ]
    for name in stale + kept:
        (tmp_path / name).write_bytes(OLD)
    (tmp_path / f".folder.{dead}.0123abcd.tmp").mkdir()
    with open(tmp_path / f".locked.{dead}.0123abcd.tmp", "rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        write_atomic(tmp_path / "new", NEW)
    left = set(os.listdir(tmp_path))
    assert left == {*kept, "new", f".folder.{dead}.0123abcd.tmp"}


# -- reading ---------------------------------------------------------------------------------------


def test_read_regular_stops_at_the_limit_even_if_the_file_grows(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    assert read_regular(path, 10) == bytes(10)
    with pytest.raises(FormatError, match="10 bytes, at most 9"):
        read_regular(path, 9)
    monkeypatch.setattr(atomic, "_check_regular", lambda *_: None)  # as if it grew just after
    with pytest.raises(FormatError, match="too large"):
        read_regular(path, 9)


# folders


@contextlib.contextmanager
def filled(target: Path, names: Sequence[str] = ("a", "b/c")) -> Iterator[Path]:
    """A hidden folder beside the target with files that nobody else may read."""
    with atomic.hidden_folder(target) as hidden:
        for name in names:
            (hidden / name).parent.mkdir(exist_ok=True)
            (hidden / name).write_bytes(NEW)
            (hidden / name).chmod(0o600)
        yield hidden


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_seen_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with umask(0o027), filled(target) as hidden:
        assert listed(tmp_path) == [".out.tmp", ".out.tmp/a", ".out.tmp/b", ".out.tmp/b/c"]
        atomic.put_folder(hidden, target)
    assert listed(tmp_path) == ["out", "out/a", "out/b", "out/b/c"]
    assert mode(target / "b/c") == 0o640
    with filled(target, ["d"]) as hidden:
        atomic.put_folder(hidden, target)
    assert listed(tmp_path) == ["out", "out/d"]


def test_what_fails_in_the_block_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    with filled(target) as hidden:
        atomic.put_folder(hidden, target)
    with pytest.raises(KeyboardInterrupt), filled(target, ["d"]):
        raise KeyboardInterrupt
    rename = Path.rename

    def fails(self, to):
        if self.name == ".out.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ResourceError, match="Input/output error"), filled(target, ["d"]) as hidden:
        atomic.put_folder(hidden, target)
    assert listed(tmp_path) == ["out", "out/a", "out/b", "out/b/c"]


def test_what_a_killed_writer_left_is_cleared_and_a_living_one_is_left_alone(tmp_path):
    left = tmp_path / ".out.tmp" / "half"
    left.mkdir(parents=True)
    with atomic.hidden_folder(tmp_path / "out") as hidden:
        assert not listed(hidden)
        with pytest.raises(ResourceError, match="another run is writing"):
            with atomic.hidden_folder(tmp_path / "out"):
                pass
        assert hidden.is_dir()
    assert not listed(tmp_path)


def test_entries_join_what_lies_there_and_the_last_one_goes_first(tmp_path, monkeypatch):
    for name in ("mine", "a", "last"):
        (tmp_path / name).write_bytes(OLD)
    order = []
    replace = Path.replace

    def noted(self, to):
        order.append((self.name, (tmp_path / "last").exists()))
        replace(self, to)

    monkeypatch.setattr(Path, "replace", noted)
    with filled(tmp_path / "out", ["last", "a", "b/c", "z"]) as hidden:
        atomic.put_entries(hidden, tmp_path, "last")
    assert order == [(name, False) for name in ("a", "b", "z", "last")]
    assert listed(tmp_path) == ["a", "b", "b/c", "last", "mine", "z"]
    assert (tmp_path / "mine").read_bytes() == OLD and (tmp_path / "a").read_bytes() == NEW
