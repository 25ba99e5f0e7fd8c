"""A bar with the loss terms on a terminal, a plain line now and then in a log. All to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from conceptzap.report import Report
from conceptzap.terminal import show

if TYPE_CHECKING:
    from conceptzap.training.train import Event

T = TypeVar("T")
LINE_EVERY = 10.0
SMOOTHING = 0.9
EVERY_STEP = 2  # the level of detail that leaves no step out


class Progress(Report):
    """What a verb reports to while it works; each line begins with the seconds since the start."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()

    def note(self, text: str) -> None:
        show.note(f"[{time.monotonic() - self.began:.0f} s] {text}")

    def warn(self, text: str) -> None:
        show.warn(text)

    def phase(self, text: str) -> None:
        """A slow thing begins: for whoever watches a terminal, or asked for details."""
        if sys.stderr.isatty() or show.wants_detail():
            self.note(text)

    def progress(self, events: Iterable[Event], label: str = "") -> Iterator[Event]:
        """Pass training events through, drawing steps, smoothed loss terms, speed and time left."""
        smooth: dict[str, float] = {}
        with _Meter(self, label or "training") as meter:
            for event in events:
                for name, value in event.terms.items():
                    smooth[name] = SMOOTHING * smooth.get(name, value) + (1 - SMOOTHING) * value
                terms = ", ".join(f"{name} {value:.3g}" for name, value in smooth.items())
                meter.at(event.step, event.total, terms)
                yield event

    def count(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Pass items through, counting them."""
        with _Meter(self, label) as meter:
            for done, item in enumerate(items, 1):
                meter.at(done, total, "")
                yield item


def animated() -> bool:
    """Only where somebody watches: a terminal that can move its cursor, and no CI."""
    return (
        sys.stderr.isatty()
        and os.environ.get("TERM") != "dumb"
        and not os.environ.get("CI")
        and show.wants_progress()
        and not show.wants_detail(EVERY_STEP)
    )


class _Meter:
    """One line of progress, drawn or logged; the last one stays."""

    def __init__(self, report: Report, label: str) -> None:
        self.report, self.label = report, label
        self.bar = self.task = None
        self.line = self.written = ""
        self.logged = time.monotonic()
        self.every = 0.0 if show.wants_detail(EVERY_STEP) else LINE_EVERY
        self.pace = _Pace()

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
            progress.TextColumn("{task.fields[terms]}"),
            console=show.console(sys.stderr),
            transient=True,
        )
        self.task = self.bar.add_task(self.label, total=None, terms="")
        self.bar.start()

    def at(self, done: int, total: int, terms: str) -> None:
        terms = ", ".join(filter(None, (self.pace.at(done, total), terms)))
        self.line = f"{self.label} {done}/{total} {terms}".rstrip()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, terms=terms)
        elif time.monotonic() - self.logged >= self.every:
            self.logged = time.monotonic()
            self._write()

    def _write(self) -> None:
        if show.wants_progress() and self.line != self.written:
            self.written = self.line
            self.report.note(self.line)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error is None:
            self._write()


class _Pace:
    """How fast it goes since it was first looked at, and how long it will take yet."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None

    def at(self, done: int, total: int) -> str:
        now = time.monotonic()
        begun, since = self.first = self.first or (done, now)
        if done == begun or now == since:
            return ""
        speed = (done - begun) / (now - since)
        left = f", {(total - done) / speed:.0f} s left" if done < total else ""
        return f"{speed:.2f}/s{left}"
