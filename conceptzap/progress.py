"""A bar with the loss terms on a terminal, a plain line every few seconds in a log. All to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from conceptzap import show
from conceptzap.report import Report

if TYPE_CHECKING:
    from conceptzap.train import Event

T = TypeVar("T")
LINE_EVERY = 10.0
SMOOTHING = 0.9


class Progress(Report):
    """What a verb reports to while it works; quiet when the user asked for it."""

    def note(self, text: str) -> None:
        show.note(text)

    def progress(self, events: Iterable[Event], label: str = "") -> Iterator[Event]:
        """Pass training events through, drawing steps, smoothed loss terms, speed and time left."""
        smooth: dict[str, float] = {}
        with _Meter(label or "training") as meter:
            for event in events:
                for name, value in event.terms.items():
                    smooth[name] = SMOOTHING * smooth.get(name, value) + (1 - SMOOTHING) * value
                terms = "  ".join(f"{name} {value:.3g}" for name, value in smooth.items())
                meter.at(event.step, event.total, terms)
                yield event

    def count(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Pass items through, counting them."""
        with _Meter(label) as meter:
            for done, item in enumerate(items, 1):
                meter.at(done, total, "")
                yield item


def animated() -> bool:
    """Only where somebody watches: a terminal that can move its cursor, and no CI."""
    return (
        sys.stderr.isatty()
        and os.environ.get("TERM") != "dumb"
        and not os.environ.get("CI")
        and not show.is_quiet()
    )


class _Meter:
    """One line of progress, drawn or logged."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar = self.task = None
        self.logged = time.monotonic()

    def __enter__(self) -> _Meter:
        if animated():
            self._start_bar()
        return self

    def _start_bar(self) -> None:
        from rich import progress

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[terms]}"),
            console=show.console(sys.stderr),
            transient=True,
        )
        self.task = self.bar.add_task(self.label, total=None, terms="")
        self.bar.start()

    def at(self, done: int, total: int, terms: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, terms=terms)
        elif done == total or time.monotonic() - self.logged >= LINE_EVERY:
            self.logged = time.monotonic()
            show.note(f"{self.label} {done}/{total}  {terms}".rstrip())

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
