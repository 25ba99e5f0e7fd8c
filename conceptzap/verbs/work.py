"""What a method is given while it works: phases that are said and timed, sessions, a log, samples."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from conceptzap.base import Base
from conceptzap.edit import Edit, Json
from conceptzap.errors import Interrupted, escape
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import wordings
from conceptzap.training.patience import PROMPTS, Patience, Way
from conceptzap.training.session import Session
from conceptzap.verbs import preview, tracking
from conceptzap.verbs.generating import usual
from conceptzap.verbs.planning import ErasePlan

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
TERMINATED = 128 + signal.SIGTERM


class Phases:
    """What `erase` is doing, said when it begins, and the seconds that each took."""

    def __init__(self, report: Report) -> None:
        self.report, self.seconds, self.name = report, {}, ""
        self.since = time.monotonic()

    def enter(self, name: str, about: str = "") -> None:
        """Another phase begins, or one goes on; only the first time it is said."""
        now = time.monotonic()
        if self.name:
            self.seconds[self.name] += now - self.since
        if name and name not in self.seconds:
            self.report.phase(about or name)
            self.seconds[name] = 0.0
        self.name, self.since = name, now


class Work(Report):
    """What a method is given: the caller's report, the seed, and a session for each training."""

    def __init__(
        self, plan: ErasePlan, base: Base, task: Task, report: Report, phases: Phases, resume: bool
    ) -> None:
        super().__init__(plan.seed)
        self.plan, self.phases, self.resume = plan, phases, resume
        self.base, self.task = base, task
        self.log = tracking.Log(plan.logs, plan.log_with, plan.sample_every, plan.record())
        self.watched: Sequence[Edit] = ()
        self.note, self.warn, self.phase = report.note, report.warn, report.phase
        self.count, self.shown = report.count, report.progress
        self.folder = plan.checkpoints
        self.command = plan.resume_command()
        self.sessions: list[Session] = []
        if not resume:
            self._discard()
        elif not any(self.folder.glob("*/step-*")):
            report.warn(f"nothing to take up in {escape(self.folder)}: starting anew")

    def progress(self, events: Iterable[T]) -> Iterator[T]:
        """Training events, shown by the caller's report; before and after them it is preparing."""
        self.phases.enter("learning")
        watched, self.watched = self.watched, ()
        if self.plan.sample_every and not watched:
            self.warn(f"{self.plan.method} has nothing to draw samples of in this training")
        step = total = 0
        sample = partial(self._sample, watched) if watched else None
        for event in self.log.follow(self.shown(events), sample):
            step, total = event.step, event.total
            yield event
        if step < total:
            few = f"{self.plan.patience} checks in a row brought nothing more"
            self.note(f"learning ended at step {step} of {total}: {few}")
        self.phases.enter("preparing")

    def watch(self, edits: Sequence[Edit]) -> None:
        self.watched = edits

    def _sample(self, edits: Sequence[Edit]) -> np.ndarray:
        """A sheet of the concept under the edits as they are now, as their file would have them."""
        now = [plain(edit) for edit in edits]
        return preview.sample(self.base, self.task, now, self.plan.seed, usual(self.base))

    def session(self, settings: Mapping[str, object]) -> Session:
        """Where the method's next training is kept; trainings are told apart by their order."""
        identity = {**self.plan.record(), "output": "", "trained": dict(settings)}
        session = self._session(str(len(self.sessions) + 1), identity)
        if self.plan.patience:
            session.patience = self._patience(self.plan.patience)
        if self.resume and session.resume:
            self.note(f"taking up the training at step {session.resume}")
        self.sessions.append(session)
        return session

    def _patience(self, checks: int) -> Patience | None:
        """Looks at what the next training changes, as it stands; warns of one that cannot be looked at."""
        if not self.watched:
            self.warn(f"{self.plan.method} has nothing to look at in this training: it goes to its last step")
            return None
        prompts = (
            wordings.pairs(concept, anchor or "", kind, preview.usual_things(self.base, self.task, kind))
            for concept, anchor, kind in self.task.triples
        )
        known = ([one for one in some if not self.base.unknown_words(one.concept)] for some in prompts)
        way = Way(self.base, [pair for some in known for pair in some[:PROMPTS]])
        return Patience(checks, partial(way.gone, self.watched))

    def _session(self, name: str, identity: Mapping[str, Json]) -> Session:
        return Session(self.folder / name, identity, self.command, warn=self.warn)

    def _discard(self) -> None:
        """Remove what an earlier run left; raises `ResourceError` while that run goes on."""
        for left in sorted(self.folder.glob("[0-9]*")):
            session = self._session(left.name, {})
            with session.running():
                session.clear()
        self._remove_folder()

    def clear(self) -> None:
        for session in self.sessions:
            session.clear()
        self._remove_folder()

    def _remove_folder(self) -> None:
        # it stays where something of somebody else's lies in it
        with suppress(OSError):
            self.folder.rmdir()

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Whatever stops the work after a checkpoint says how to go on from it."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code != TERMINATED or not self._kept():
                raise
            signum = signal.SIGTERM if isinstance(error, SystemExit) else signal.SIGINT
            message = (
                f"stopped by {signum.name}; the training is kept in {escape(self.folder)}"
            )
            raise Interrupted(message, f"go on with: {self.command}", signum) from error

    def _kept(self) -> bool:
        return any(self.folder.glob("*/step-*"))


def plain(edit: Edit) -> Edit:
    """An edit as a file gives it back: fp16 tensors, fp32 gates, on the CPU."""
    tensors = {slot: _stored(tensor.detach().cpu()) for slot, tensor in edit.tensors.items()}
    return replace(edit, tensors=tensors)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float16) if tensor.is_floating_point() else tensor
