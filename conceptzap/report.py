"""What a method may say while it works: progress, notes, and where its training is kept. No torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from conceptzap.edit import Edit
    from conceptzap.training.session import Session

T = TypeVar("T")
PACKAGE = __name__.partition(".")[0]
AFTER = 1.0  # seconds that work may take before it gets a bar


class Report:
    """Says nothing and keeps nothing; `Bars` is what Python users get, the command line has its own."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def note(self, text: str) -> None:
        """One line about what is going on."""

    def warn(self, text: str) -> None:
        """One line about what may not be meant."""
        self.note(f"warning: {text}")

    def phase(self, text: str) -> None:
        """One line about what begins and may take long."""

    def progress(self, events: Iterable[T]) -> Iterator[T]:
        """Pass training events through, showing them on the way."""
        yield from events

    def count(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Pass on the `total` items of some work called `label`, showing how many are done."""
        yield from items

    def watch(self, edits: Sequence[Edit]) -> None:
        """What the next training changes, as it goes: edits over the parameters themselves.

        A method that says it lets samples be drawn between steps.
        """

    def session(self, config: Mapping[str, object]) -> Session | None:
        """Where to keep checkpoints of a training with this config; None keeps none."""
        return None


class Bars(Report):
    """What is used from Python where no report is handed in: Python's warnings, bars by tqdm."""

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=_outside())

    def progress(self, events: Iterable[T]) -> Iterator[T]:
        with _bar("training") as bar:
            for event in events:
                now: Any = event
                bar.total = now.total
                bar.set_postfix({name: f"{value:.3g}" for name, value in now.terms.items()}, False)
                bar.update(now.step - bar.n)
                yield event

    def count(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        with _bar(label, total) as bar:
            for item in items:
                bar.update()
                yield item


def _bar(label: str, total: int | None = None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(desc=label, total=total, leave=False, delay=AFTER)


def begun(report: Report | None) -> Report:
    """The report of a call, `Bars` for none, told at once that what takes seconds to import is on its way."""
    report = report or Bars()
    report.phase("loading torch")
    return report


def _outside() -> int:
    """The `stacklevel` at which whoever called into this package is shown, from `warn` on."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        level, frame = level + 1, frame.f_back
    return level
