"""A bar with the loss terms on a terminal, a plain line now and then in a log. All to stderr."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from conceptzap.report import Report
from conceptzap.terminal import show

if TYPE_CHECKING:
    from conceptzap.training.train import Event

T = TypeVar("T")
LINE_EVERY = 10.0
SMOOTHING = 0.9
EVERY_STEP = 2  # the level of detail that leaves no step out


class Progress(Report):
    """What a verb reports to while it works; each line begins with the seconds since the start.

    Between two lines something moves: a spinner on a terminal, in a log what is being done, again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()
        self.meter: _Meter | None = None
        self.doing = ""

    def stamped(self, text: str) -> str:
        return f"[{time.monotonic() - self.began:.0f} s] {text}"

    def note(self, text: str) -> None:
        show.note(self.stamped(text))
        self._go_on()

    def warn(self, text: str) -> None:
        show.warn(text)
        self._go_on()

    def _go_on(self) -> None:
        """What was being done before something was said is still being done."""
        if self.meter is None and self.doing:
            show.moving(Pulse(self, lambda: self.doing))

    def phase(self, text: str) -> None:
        """A slow thing begins: said to whoever watches a terminal, or asked for details."""
        self.doing = text
        if self.meter is not None:
            self.meter.beside(text)
        if sys.stderr.isatty() or show.wants_detail():
            self.note(text)
        else:
            self._go_on()

    def progress(self, events: Iterable[Event], label: str = "") -> Iterator[Event]:
        """Pass training events through, drawing steps, smoothed loss terms, speed and time left."""
        smooth: dict[str, float] = {}
        with _Meter(self, label or "training") as meter:
            for event in events:
                for name, value in event.terms.items():
                    smooth[name] = SMOOTHING * smooth.get(name, value) + (1 - SMOOTHING) * value
                meter.at(event.step, event.total, _losses(smooth))
                yield event

    def count(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Pass items through, counting them: beside the count that is going on, if one is."""
        if self.meter is not None:
            for done, item in enumerate(items, 1):
                self.meter.beside(f"{label} {done}/{total}")
                yield item
            return
        with _Meter(self, label) as meter:
            meter.at(0, total, "")
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


class Pulse:
    """A sign of life until something else is said: a spinner, or in a log a line now and then."""

    def __init__(self, report: Progress, text: Callable[[], str]) -> None:
        self.report, self.text, self.stopped = report, text, False
        self.spinner: Any = None
        self.timer: threading.Timer | None = None
        if animated():
            from rich.status import Status

            self.spinner = Status(show.one_line(text()), console=show.console(sys.stderr))
            self.spinner.start()
        elif show.wants_progress():
            self._wait()

    def _wait(self) -> None:
        self.timer = threading.Timer(LINE_EVERY, self._beat)
        self.timer.daemon = True
        self.timer.start()

    def _beat(self) -> None:
        if self.stopped:
            return
        print(show.one_line(self.report.stamped(self.text())), file=sys.stderr, flush=True)
        self._wait()

    def stop(self) -> None:
        self.stopped = True
        if self.spinner is not None:
            self.spinner.stop()
        if self.timer is not None:
            self.timer.cancel()


def _losses(terms: Mapping[str, float]) -> str:
    """`loss 0.0004`, or each of several by its name; lower is better for all of them."""
    if len(terms) == 1:
        return f"loss {next(iter(terms.values())):.3g}"
    named = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
    return f"losses: {named}" if named else ""


class _Meter:
    """One line of progress, drawn or logged; the last one stays."""

    def __init__(self, report: Progress, label: str) -> None:
        self.report, self.label = report, label
        self.bar = self.task = None
        self.line, self.written, self.inner = label, "", report.doing
        self.logged = time.monotonic()
        self.every = 0.0 if show.wants_detail(EVERY_STEP) else LINE_EVERY
        self.pace = _Pace()

    def __enter__(self) -> _Meter:
        show.settle()
        self.report.meter = self
        if animated():
            self._start_bar()
        else:
            show.moving(Pulse(self.report, self._state))
        return self

    def _state(self) -> str:
        return ", ".join(filter(None, (self.line, self.inner)))

    def _start_bar(self) -> None:
        from rich import progress

        self.bar = progress.Progress(
            progress.SpinnerColumn(),
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
        """So much is done; `terms` is shown behind it."""
        if not done:  # nothing to log yet
            if self.bar is not None:
                self.bar.update(self.task, total=total)
            return
        self.inner = ""
        terms = ", ".join(filter(None, (self.pace.at(done, total), terms)))
        self.line = f"{self.label} {done}/{total} {terms}".rstrip()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, terms=terms)
        elif time.monotonic() - self.logged >= self.every:
            self._write()

    def beside(self, text: str) -> None:
        """How far the item is that is being worked on."""
        self.inner = text
        if self.bar is not None:
            self.bar.update(self.task, terms=text)

    def _write(self) -> None:
        if show.wants_progress() and self.line not in (self.written, self.label):
            self.logged, self.written = time.monotonic(), self.line
            self.report.note(self.line)
            if self.report.meter is self:
                show.moving(Pulse(self.report, self._state))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.report.meter = None
        show.settle()
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
