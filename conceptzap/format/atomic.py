"""Reading whole files once, writing them whole or not at all, and printing names we did not choose.

POSIX only. A temporary file is called `.NAME.PID.RANDOM.tmp` and lies beside its target, a folder
that is being made `.NAME.tmp`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conceptzap.errors import (
    ConceptZapError,
    FormatError,
    ResourceError,
    UsageError,
    escape,
)
from conceptzap.format import naming

# bytes `check_writable` tries to write: about a small erasure with its preview
PROBE = 2**16
TEMPORARY = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.tmp")
# a temporary name must stay below the 255 bytes of NAME_MAX, at 4 bytes a character
NAME_SHARE = 40
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


def read_regular(path: Path | str, limit: int) -> bytes:
    """All bytes of a regular file (links are followed), read once.

    Raises `FormatError` when it is missing, no regular file, unreadable or over `limit` bytes.
    """
    try:
        # without O_NONBLOCK, opening a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_regular(path, os.fstat(descriptor), limit)
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise FormatError(f"no such file: {escape(path)}", _nearest(Path(path))) from error
    except (OSError, ValueError) as error:
        hint = "name a file that can be read"
        raise FormatError(f"cannot read {escape(path)}: {_reason(error)}", hint) from error
    if len(data) > limit:
        raise _too_large(path, len(data), limit)
    return data


def _reason(error: Exception) -> str:
    return escape(getattr(error, "strerror", None) or error)


def _check_regular(path: Path | str, status: os.stat_result, limit: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise FormatError(f"{escape(path)} is a folder", "name the file in it")
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{escape(path)} is not a regular file", "name a file on a disk")
    if status.st_size > limit:
        raise _too_large(path, status.st_size, limit)


def _too_large(path: Path | str, size: int, limit: int) -> FormatError:
    return FormatError(
        f"{escape(path)} is too large: {size} bytes, at most {limit} are read",
        "is it the file you meant?",
    )


def _nearest(path: Path) -> str:
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return f"there is no folder {escape(path.parent)}"
    # endings that may be left out must neither hide a name that is near nor make one near
    known = {naming.bare(name): name for name in reversed(names)}
    close = difflib.get_close_matches(naming.bare(path.name), known, n=3, cutoff=0.5)
    near = [known[name] for name in close]
    near = [name for name in near if name.endswith(naming.SUFFIX)] or near  # what was meant most likely
    return f"did you mean {' or '.join(map(escape, near))}?" if near else "check the name"


@dataclass(frozen=True)
class _Target:
    """Where bytes really go: links resolved, and the permissions of a file that is replaced."""

    path: Path
    mode: int | None


def _target(path: Path | str, force: bool) -> _Target:
    try:
        real = Path(os.path.realpath(path))
        status = _status(real)
    except (OSError, ValueError) as error:
        hint = "choose another name"
        raise UsageError(f"cannot write {escape(path)}: {_reason(error)}", hint) from error
    if status is None:
        return _Target(real, None)
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{escape(path)} is a folder", "name a file")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{escape(path)} is not a regular file", "name a file on a disk")
    if not force:
        raise _exists(path)
    return _Target(real, stat.S_IMODE(status.st_mode) & 0o777)


def _status(real: Path) -> os.stat_result | None:
    try:
        return real.stat()
    except (FileNotFoundError, PermissionError):  # a folder that forbids is reported when opened
        return None


def _exists(path: Path | str) -> UsageError:
    return UsageError(f"{escape(path)} exists", "choose another name, or overwrite it with --force")


def check_writable(path: Path | str, force: bool = False) -> None:
    """Raise now what `write_atomic` would raise later; leaves nothing behind.

    `UsageError`: it exists (without `force`), is a folder, or its folder is missing.
    `ResourceError`: read-only, no permission, or not even 64 kB of space.
    """
    target = _target(path, force)
    with _reported(path, target.path.parent, PROBE), _folder(target.path.parent) as folder:
        with _temporary(folder, target) as (name, descriptor):
            _fill(descriptor, bytes(PROBE))
            os.unlink(name, dir_fd=folder)


def write_atomic(path: Path | str, data: bytes, force: bool = False) -> None:
    """Write a file so that others see the old one or the whole new one, also after a crash.

    A link is followed and its file replaced. The mode is that of the file replaced, else what the
    umask allows. Raises like `check_writable`; nothing partial is left behind.
    """
    target = _target(path, force)
    with _reported(path, target.path.parent, len(data)), _folder(target.path.parent) as folder:
        _sweep(folder)
        with _temporary(folder, target) as (name, descriptor):
            _fill(descriptor, data)
            if force:
                os.replace(name, target.path.name, src_dir_fd=folder, dst_dir_fd=folder)
            else:
                _place(folder, name, target.path.name)
        _sync_folder(folder)


# folders


@contextlib.contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """An empty folder `.NAME.tmp` beside `target`, to be filled and put in its place in the block.

    What is left of it at the end goes. Its name is always the same, so that the next writer clears
    away what a killed one left; a lock keeps two apart (`ResourceError`).
    """
    hidden = target.with_name(f".{target.name}.tmp")
    with _reported(target, target.parent, 0):
        hidden.mkdir(exist_ok=True)
        handle = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _lock(handle, target)
        with _reported(target, target.parent, 0):
            for path in hidden.iterdir():
                remove(path)
        try:
            yield hidden
        finally:
            remove(hidden)
    finally:
        os.close(handle)


def put_folder(hidden: Path, target: Path) -> None:
    """Rename a whole folder; one that stood there goes after that, or comes back where that fails."""
    old = target.with_name(f".{target.name}.old")
    with _reported(target, target.parent, 0):
        settle(hidden)
        if target.exists():
            remove(old)
            target.rename(old)
        try:
            hidden.rename(target)
        except OSError:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        sync(target.parent)
        remove(old)


def put_entries(hidden: Path, folder: Path, last: str, stale: Iterable[str] = ()) -> None:
    """Move what is in `hidden` into a folder that has other things too, `last` when the rest is there.

    An entry of the same name is replaced, one of a `stale` name goes; `last` goes first, so that where it
    lies all is of one kind.
    """
    with _reported(folder / last, folder, 0):
        settle(hidden)
        for name in (last, *stale):
            remove(folder / name)
        for path in sorted(hidden.iterdir(), key=lambda path: (path.name == last, path.name)):
            if path.is_dir():
                remove(folder / path.name)
            path.replace(folder / path.name)
        sync(folder)


def settle(folder: Path) -> None:
    """All on the disk, and readable for whom the umask says (some write files for the owner alone)."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """A file or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network disks cannot do this to a folder
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file, a link or a folder with all in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(handle: int, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        hint = "wait for it, or choose another --output"
        raise ResourceError(f"another run is writing {escape(target)}", hint) from error
    except OSError:
        pass  # a file system without locks: of two at once, one fails


# the steps of all that


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[int]:
    """The folder, held open, so that nothing can be put in its place meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(folder: int, target: _Target) -> Iterator[tuple[str, int]]:
    """A new file in the folder, opened for writing; gone at the end unless it was renamed."""
    name = f".{target.path.name[:NAME_SHARE]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o666, dir_fd=folder)
    try:
        # the lock tells `_sweep` that the writer lives; some network disks have none
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if target.mode is not None:
            os.fchmod(descriptor, target.mode)
        yield name, descriptor
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _fill(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _sync_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks cannot
            raise


def _place(folder: int, name: str, final: str) -> None:
    """Give the temporary file its final name unless that is taken (a rename would overwrite)."""
    try:
        os.link(name, final, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    # a disk without links: two writers at the same moment may overwrite one another, whole
    if os.access(final, os.F_OK, dir_fd=folder, follow_symlinks=False):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.replace(name, final, src_dir_fd=folder, dst_dir_fd=folder)


def _sweep(folder: int) -> None:
    """Remove temporary files of ours whose writer is dead."""
    for name in os.listdir(folder):
        match = TEMPORARY.fullmatch(name)
        if match and not _alive(int(match[1])):
            with contextlib.suppress(OSError):
                _remove_unlocked(folder, name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove_unlocked(folder: int, name: str) -> None:
    """A writer in another container has a pid that means nothing here, but holds its lock."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=folder)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reported(path: Path | str, folder: Path, needed: int) -> Iterator[None]:
    """Every `OSError` in the block as the error a user can act on."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path, folder, needed) from error


def _explain(error: OSError, path: Path | str, folder: Path, needed: int) -> ConceptZapError:
    if error.errno == errno.EEXIST:
        return _exists(path)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UsageError(f"there is no folder {escape(folder)}", "create it first")
    if error.errno in NO_SPACE:
        return ResourceError(
            f"no space for {escape(path)}: {needed} bytes needed, {_free(folder)} free",
            "make room, or write to another disk",
        )
    return ResourceError(
        f"cannot write in {escape(folder)}: {escape(error.strerror)}",
        "choose a folder that can be written to with --output",
    )


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
