"""What lets a training outlive Ctrl-C, SIGTERM, `kill -9` and a full disk: its checkpoints on disk.

A checkpoint is a folder `step-000120/` of `state.safetensors` (parameters, Adam's moments and step
counts), `meta.json` (step, config, sha256 of the state) and `DONE` (sha256 of `meta.json`). It is
made under a hidden name, synced and then renamed, so a name that can be seen is whole; the digests
catch what a disk does to it afterwards. Nothing in it is pickled, and no random generator's state
is kept: losses draw from a generator seeded by (seed, step).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap.edit import Json, canonical_json
from conceptzap.errors import Interrupted, MismatchError, ResourceError, escape
from conceptzap.format import atomic

if TYPE_CHECKING:
    import torch

    from conceptzap.training.patience import Patience

FORMAT = "conceptzap.checkpoint/1"
STATE, META, DONE = "state.safetensors", "meta.json", "DONE"
NAME = re.compile(r"step-\d{6,}")
HIDDEN = ".step-"
KEEP = 2


@dataclass(frozen=True)
class State:
    """A training after `step` whole steps: what the next one depends on.

    `parts`: pieces a batch is cut into; `scale`: of the loss in half precision, 1 for none;
    `tensors`: `group/parameter/slot` -> the parameter's value and its optimiser's moments; `checks`:
    what was gone of the concept, as often as it was asked.
    """

    step: int = 0
    parts: int = 1
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scale: float = 1.0
    checks: tuple[float, ...] = ()


@dataclass
class Stop:
    """`signum` is set by the first SIGINT or SIGTERM; 0 is none."""

    place: str = ""
    command: str = ""
    signum: int = 0

    def error(self, step: int, total: int) -> Interrupted:
        """What to raise once the state after `step` is saved."""
        name = signal.Signals(self.signum).name
        hint = f"go on with: {self.command}" if self.command else "repeat the command with --resume"
        return Interrupted(
            f"stopped by {name} after step {step} of {total}; its state is kept in {self.place}",
            hint,
            self.signum,
        )


class Unkept:
    """The session of a training that keeps nothing and leaves the signals alone."""

    patience: Patience | None = None

    def running(self) -> nullcontext[Stop]:
        return nullcontext(Stop())

    def restore(self) -> State:
        return State()

    def due(self) -> bool:
        return False

    def save(self, state: State) -> None:
        """Nothing to keep it in."""


class Session:
    """One training's checkpoints in `folder`; the newest whole one is where it goes on.

    `config` is everything the result depends on: a checkpoint of another one is refused
    (`MismatchError`). `command` is the command line that takes the training up again. A checkpoint
    is due every `every_seconds`. `warn` hears of damaged checkpoints that were passed over. `patience`
    ends the training before its last step, None never. Saving raises `ResourceError` when the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Json],
        command: str = "",
        every_seconds: float = 60.0,
        warn: Callable[[str], None] = lambda _: None,
        patience: Patience | None = None,
    ) -> None:
        self.patience = patience
        self.folder = Path(folder)
        self.config = json.loads(canonical_json(config))
        self.command = command
        self.every_seconds = every_seconds
        self.warn = warn
        self._saved = time.monotonic()
        self._sound: list[Path] = []
        self._damaged: list[Path] = []

    @property
    def resume(self) -> int:
        """The step a training would go on from; 0 when there is nothing to take up."""
        return self.restore().step

    @contextmanager
    def running(self) -> Iterator[Stop]:
        """Hold the folder against a second run and hear signals: the first sets the `Stop`."""
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        stop = Stop(escape(str(self.folder)), self.command)
        with locked(self.folder), _signals(stop):
            for leftover in self.folder.glob(f"{HIDDEN}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._saved = time.monotonic()
            yield stop

    def restore(self) -> State:
        """The newest whole checkpoint, or step 0; `MismatchError` if it has another config."""
        self._sound, self._damaged = _checkpoints(self.folder), []
        while self._sound:
            try:
                config, state = _read(self._sound[-1])
            except _Damaged as error:
                self._damaged.append(self._sound.pop())
                self.warn(f"passed over a damaged checkpoint, {escape(str(error))}")
            else:
                self._check(config)
                if self.patience:
                    self.patience.found = list(state.checks)
                return state
        return State()

    def _check(self, config: Json) -> None:
        differing = _differing(config, self.config)
        if differing:
            raise MismatchError(
                f"the saved run in {escape(str(self.folder))} differs in {escape(differing)}",
                "repeat the command as it was, or start anew without --resume",
            )

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self.every_seconds

    def save(self, state: State) -> None:
        """Write a checkpoint and drop all but the two newest; raises `ResourceError`."""
        target = self.folder / f"step-{state.step:06d}"
        if target not in self._sound:
            with _disk(self.folder):
                self._write(target, state)
            self._sound.append(target)
        for old in self._sound[:-KEEP] + self._damaged:
            _remove(old)
        self._sound, self._damaged = self._sound[-KEEP:], []
        self._saved = time.monotonic()

    def _write(self, target: Path, state: State) -> None:
        from safetensors.torch import save

        data = save(dict(state.tensors))
        meta = {
            "format": FORMAT,
            "step": state.step,
            "parts": state.parts,
            "scale": state.scale,
            "checks": self.patience.found if self.patience else [],
            "config": self.config,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        text = canonical_json(meta).encode()
        with atomic.hidden_folder(target) as hidden:
            atomic.write_atomic(hidden / STATE, data)
            atomic.write_atomic(hidden / META, text)
            atomic.write_atomic(hidden / DONE, hashlib.sha256(text).hexdigest().encode())
            # a folder of that name can only be one that `restore` found damaged
            atomic.put_folder(hidden, target)

    def clear(self) -> None:
        """Remove the checkpoints, and the folder unless something else lies in it."""
        for own in _checkpoints(self.folder):
            _remove(own)
        for leftover in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()
        self._sound, self._damaged = [], []


class _Damaged(Exception):
    """Not a whole checkpoint; the text says which and why."""


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _remove(folder: Path) -> None:
    """Out of sight first: a kill halfway must not leave a checkpoint with half its files."""
    hidden = folder.with_name(f".{folder.name}")
    with suppress(OSError):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _read(folder: Path) -> tuple[Json, State]:
    """Config and state of a checkpoint whose mark and digests hold; raises `_Damaged`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        text, data = (folder / META).read_bytes(), (folder / STATE).read_bytes()
        if (folder / DONE).read_bytes() != hashlib.sha256(text).hexdigest().encode():
            raise _Damaged(f"{folder.name}: DONE does not stand for its {META}")
        meta = json.loads(text)
        if meta["format"] != FORMAT or meta["sha256"] != hashlib.sha256(data).hexdigest():
            raise _Damaged(f"{folder.name}: {STATE} is not what {META} says")
        checks = tuple(map(float, meta["checks"]))
        state = State(meta["step"], meta["parts"], load(data), meta["scale"], checks)
        return meta["config"], state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _Damaged(f"{folder.name}: {error}") from error


def _differing(old: Json, new: Json) -> str:
    """`lr (0.1, now 0.2), keep.0 (...)`: what differs between two configs, by dotted name."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    absent = "absent"
    return ", ".join(
        f"{name} ({before.get(name, absent)}, now {after.get(name, absent)})" for name in names
    )


def _leaves(value: Json, name: str = "") -> Iterator[tuple[str, str]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        path = f"{name}.{key}" if name else str(key)
        if isinstance(inner, (dict, list)) and inner:
            yield from _leaves(inner, path)
        else:
            yield path, canonical_json(inner)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot keep a checkpoint in {escape(str(folder))}: {error.strerror or error}",
            "free some space or make the folder writable, then go on with --resume",
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """An advisory lock on the folder itself; the system drops it when the process dies."""
    with _disk(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(
                f"another run is training in {escape(str(folder))}",
                "wait for it, or choose another --output",
            ) from error
        except OSError:
            pass  # a file system without locks: checkpoints are as safe, two runs just waste work
        yield
    finally:
        os.close(handle)


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`, a second one ends the process at once.

    Only the main thread may install handlers; elsewhere signals keep the meaning they had. A signal
    that was ignored (a background job's SIGINT) stays ignored.
    """

    def handle(signum: int, _frame: object) -> None:
        if stop.signum:
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
        stop.signum = signum

    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [
            s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN
        ]
        before = {signum: signal.signal(signum, handle) for signum in heard}
    try:
        yield
    finally:
        for signum, handler in before.items():
            # None stands for a handler that was not installed from Python
            signal.signal(signum, handler or signal.SIG_DFL)
