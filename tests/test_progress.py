"""Nothing is silent for long: steps are counted, and what cannot be counted is said again."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from command import conceptzap
from samples import small

import conceptzap as package
from conceptzap import format
from conceptzap.base import Base
from conceptzap.errors import ConceptZapError, UsageError
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.terminal import progress, speech
from conceptzap.terminal.progress import Progress, Pulse
from conceptzap.trust import admission, canary
from conceptzap.verbs import erasing

EVERY = progress.LINE_EVERY  # as users have it: the tests' clock stands still


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    yield
    speech.begin()


class Log:
    """All that went to stderr."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture, self.text = capture, ""

    def getvalue(self) -> str:
        self.text += self.capture.readouterr().err
        return self.text


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


class Timer:
    """Stands for `threading.Timer`: time passes when the test says so."""

    running: list[Timer] = []

    def __init__(self, seconds: float, call: object) -> None:
        self.seconds, self.call, self.daemon = seconds, call, False

    def start(self) -> None:
        self.running.append(self)

    def cancel(self) -> None:
        if self in self.running:
            self.running.remove(self)

    @classmethod
    def pass_by(cls) -> None:
        """As long as every timer waits."""
        for timer in list(cls.running):
            timer.cancel()
            timer.call()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Timer]:
    monkeypatch.setattr(progress, "LINE_EVERY", EVERY)
    monkeypatch.setattr(threading, "Timer", Timer)
    Timer.running.clear()
    return Timer


def said(log: Log) -> list[str]:
    return [re.sub(r"^\[\d+ s\] ", "", line) for line in log.getvalue().splitlines()]


def test_in_a_log_a_phase_is_said_again_while_it_lasts(clock: type[Timer], log: Log) -> None:
    report = Progress()
    report.phase("loading demo")
    assert said(log) == [] and clock.running[0].seconds <= 10
    clock.pass_by()
    clock.pass_by()
    assert said(log) == ["loading demo", "loading demo"]
    report.note("it is found")
    assert said(log)[-1] == "it is found"
    clock.pass_by()
    assert said(log)[-1] == "loading demo"
    speech.note("done")
    assert not clock.running and said(log)[-1] == "done"


def test_a_result_ends_it(clock: type[Timer], log: Log) -> None:
    for ending in (lambda: speech.lines([]), lambda: speech.warn("x"), speech.begin):
        Progress().phase("loading")
        assert len(clock.running) == 1
        ending()
        assert not clock.running


def test_a_slow_item_is_said_with_how_far_it_is(clock: type[Timer], log: Log) -> None:
    report = Progress()
    pictures = report.count(drawing(report), 2, "drawing")
    next(pictures)
    clock.pass_by()
    assert re.fullmatch(r"drawing 1/2.*", said(log)[-1])
    report.meter.beside("step 3/20")
    clock.pass_by()
    assert re.fullmatch(r"drawing 1/2.*, step 3/20", said(log)[-1])
    assert list(pictures) == [1] and not clock.running


def drawing(report: Progress) -> Iterator[int]:
    for number in range(2):
        list(report.count(range(3), 3, "step"))
        yield number


def test_a_count_within_a_count_is_shown_beside_it(clock: type[Timer], log: Log) -> None:
    report, beside = Progress(), []
    with progress._Meter(report, "drawing") as meter:
        meter.beside = beside.append  # type: ignore[method-assign]
        assert list(report.count("ab", 2, "step")) == ["a", "b"]
    assert beside == ["step 1/2", "step 2/2"] and report.meter is None


def test_whoever_wants_quiet_has_it(clock: type[Timer], log: Log) -> None:
    speech.ask(quiet=True)
    report = Progress()
    report.phase("loading")
    assert list(report.count(range(3), 3, "step")) == [0, 1, 2]
    assert not clock.running and log.getvalue() == ""


def test_on_a_terminal_a_phase_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    pulse = Pulse(Progress(), lambda: "loading demo")
    assert pulse.spinner is not None and pulse.timer is None
    pulse.stop()
    assert "loading demo" in stream.getvalue()


@pytest.mark.parametrize("watched", [False, True], ids=["log", "terminal"])
def test_erase_is_never_silent(
    watched: bool, clock: type[Timer], tiny_folder: Path, own_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whenever something slow is begun, a bar or a spinner turns, or a line is due in 10 s at most."""
    reports: list[Progress] = []
    silent, said, counted = [], [], set()

    class Heard(Progress):
        def __init__(self) -> None:
            super().__init__()
            reports.append(self)

        def phase(self, text: str) -> None:
            said.append(text)
            super().phase(text)

        def count(self, items: Iterable[object], total: int, label: str) -> Iterator[object]:
            counted.add(label)
            yield from super().count(items, total, label)

    def alive() -> bool:
        moving = [pulse.spinner or pulse.timer in Timer.running for pulse in speech._moving]
        meter = reports[0].meter
        return any(moving) or (meter is not None and meter.bar is not None)

    def listened(home: object, name: str) -> None:
        real = getattr(home, name)

        def call(*given: object, **more: object) -> object:
            if not alive():
                silent.append(name)
            seen.add(name)
            return real(*given, **more)

        monkeypatch.setattr(home, name, call)

    seen: set[str] = set()
    slow = {erasing: "find_base fitting_task _edits closing drawn _write", Base: "predict encode decode",
            admission: "admit", canary: "make"}  # fmt: skip
    for home, names in slow.items():
        for name in names.split():
            listened(home, name)
    monkeypatch.setattr(progress, "Progress", Heard)
    monkeypatch.setattr(progress, "animated", lambda: watched)
    monkeypatch.setattr(erasing, "usual", lambda base: Settings(steps=1, guidance=1.0))
    words = ("erase", "church", "--method", "uce", "--base", tiny_folder, "-o", tmp_path / "x")
    words += ("--set", "keep_prompts=12")
    answer = conceptzap(*words)
    assert answer.code == 0, answer
    assert said[0] == "loading torch" and "step" in counted, "before torch is there; of the preview too"
    assert silent == [] and seen == {name for names in slow.values() for name in names.split()}
    assert watched or all(timer.seconds <= 10 for timer in Timer.running)


@pytest.mark.parametrize(
    "words", [("lock", "a"), ("verify",), ("doctor",), ("ui",), ("stack", "a", "--base", "demo", "-o", "b")]
)
def test_what_is_slow_says_so_first(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Commands that train nothing: the first slow thing is said before it begins."""

    def said(_: object, text: str) -> None:
        raise UsageError(f"said: {text}", "")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Progress, "phase", said)
    format.save(small(), tmp_path / "a.lprompt.safetensors")
    answer = conceptzap(*words)
    assert answer.code == 2 and "error: said: " in answer.err


def test_generate_counts_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    beside: list[str] = []
    monkeypatch.setattr(progress._Meter, "beside", lambda self, text: beside.append(text))
    answer = conceptzap("generate", "a cat", "--steps", "3", "-o", f"{tmp_path}/a.png")
    assert answer.code == 0, answer
    steps = [text for text in beside if text.startswith("step")]
    assert steps == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]


@pytest.mark.parametrize("verb", ["erase", "evaluate", "attack", "bench", "harden", "import_"])
def test_what_takes_seconds_to_import_is_told_of_first(verb: str, tmp_path: Path) -> None:
    """Torch is on its way before a file is looked for, so that no terminal waits in silence."""
    said: list[str] = []

    class Heard(Report):
        def phase(self, text: str) -> None:
            said.append(text)

    none, place = tmp_path / "none.lprompt.safetensors", {"output": tmp_path / "out"}
    calls = {
        "erase": (["cat"], {"base": tmp_path / "none", **place}), "attack": ([none, "seeds"], {}),
        "bench": ([tmp_path / "none.toml"], place),
    }  # fmt: skip
    words, more = calls.get(verb, ([none], {}))
    with pytest.raises(ConceptZapError):
        getattr(package, verb)(*words, **more, report=Heard())
    assert said[0] == "loading torch"
