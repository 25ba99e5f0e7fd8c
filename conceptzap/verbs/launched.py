"""The processes of one `accelerate launch`: what each of them does, where, and whether all are there.

`accelerate` splits, carries and waits; nothing here decides who does what. Without a launcher there is one
process, and neither accelerate nor torch is imported. Results never depend on how many there are.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from conceptzap.errors import ConceptZapError, Interrupted, escape

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
STOPPED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# what torchrun's launcher and MPI's tell each process: how many there are, and which it is
COUNT, NUMBER = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"), ("RANK", "OMPI_COMM_WORLD_RANK")
AGAIN = "give the same command again: what is finished is kept"
NAMED = 20  # of what is missing
LONGEST_WAIT = timedelta(days=7)  # for the slowest; a process that dies is noticed at once


class Team:
    """This process among those that a launcher started together; alone where there is none.

    `index` of `count`; the one that `leads` writes and tells what all have done.
    """

    def __init__(self, device: str = "auto") -> None:
        self.state = _state(device) if _told(COUNT, 1) > 1 else None
        self.index = self.state.process_index if self.state else 0
        self.count = self.state.num_processes if self.state else 1
        self.leads = self.index == 0
        # each process on a GPU of its own
        self.device = str(self.state.device) if self.state and device == "auto" else device

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """The items that are this process's, each with its number among all, from 1."""
        numbered = list(enumerate(items, 1))
        if self.state is None:
            return numbered
        # where there are too few, accelerate hands the last out twice
        with self.state.split_between_processes(numbered) as mine:
            return list(mine) if self.index < len(numbered) else []

    def gather(self, items: Sequence[T]) -> list[T]:
        """What each process brings, in order, once all are here; raises `LostProcess` where one is not."""
        if self.state is None:
            return list(items)
        from accelerate.utils import gather_object

        try:
            return gather_object(list(items))
        except RuntimeError as error:  # gloo and nccl tell of a closed connection by no type of their own
            raise LostProcess("a process of this run was lost", AGAIN) from error

    def wait(self) -> None:
        """Until all are here."""
        self.gather([None])


class LostProcess(ConceptZapError):
    """One of the processes that work together ended before its work did."""


@contextmanager
def drawing(team: Team) -> Iterator[None]:
    """Inside the block what is drawn for the cache is shared among the team."""
    if team.count == 1:
        yield
        return
    from conceptzap.evaluation.cached import drawn_by

    with drawn_by(team):
        yield


def leads() -> bool:
    """Whether this process is the one that tells: a launcher ends all as soon as one of them fails."""
    return _told(NUMBER, 0) == 0


def _told(names: Sequence[str], alone: int) -> int:
    """A number that a launcher tells its processes; `alone` where there is none."""
    return int(next(filter(None, map(os.environ.get, names)), alone))


@contextmanager
def telling(missing: Callable[[], Sequence[str]], total: int, what: str) -> Iterator[None]:
    """Whatever stops the block, a signal or a lost process, says what of all is missing then."""

    def said(how: str) -> str:
        names = [escape(name) for name in missing()]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"{how}; {len(names)} of {total} {what} are missing: {', '.join(names[:NAMED])}{more}"

    try:
        yield
    except LostProcess as error:
        raise LostProcess(said(str(error)), AGAIN) from error
    except (Interrupted, KeyboardInterrupt, SystemExit) as error:
        code = error.exit_code if isinstance(error, Interrupted) else getattr(error, "code", STOPPED)
        if code not in (STOPPED, TERMINATED):
            raise
        signum = signal.Signals(code - 128)
        raise Interrupted(said(f"stopped by {signum.name}"), AGAIN, signum) from error


def _state(device: str) -> PartialState:
    import torch
    from accelerate import PartialState

    # processes that share no GPU find one another only when accelerate is told so
    rest: dict[str, Any] = {"cpu": device == "cpu" or not torch.cuda.is_available()}
    return PartialState(timeout=LONGEST_WAIT, **rest)
