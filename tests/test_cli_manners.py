"""How much the command line says, and how: quiet and loud, in colour, on terminals, pipes and logs."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command import conceptzap, contents
from process import FRESH, Program
from samples import rich
from test_cli import program
from test_cli_flow import closed_form

from conceptzap import format
from conceptzap.cli import main
from conceptzap.cli import program as program_of
from conceptzap.registry import catalog, family
from conceptzap.terminal.listing import NARROW
from conceptzap.terminal.progress import Pulse
from conceptzap.testing import save_tiny

COMMANDS = list(family.files("cli"))
SHARED = ("-q", "--quiet", "-v", "-vv", "--no-progress", "--no-color", "--offline", "--debug")
GOOD = "a.lprompt.safetensors"
pytestmark = pytest.mark.usefixtures("few_steps", "loaded_once")
DRAW = ("a cat", "--count", "3", "--steps", "1", "--base", "base", "--force")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manners")
    save_tiny(folder / "base")
    format.save(rich(), folder / GOOD)
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


# quiet and loud


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_options_of_the_program_and_json(name: str) -> None:
    help_ = conceptzap(name, "--help").out
    assert "  --json " in help_ and not any(f"  {option}" in help_ for option in SHARED)
    for option in SHARED:
        assert conceptzap(name, option, "--help").out == help_


def test_quiet_is_names_alone(here: Path) -> None:
    digest = format.read_header(here / GOOD).digest
    plan = ("erase", "cat", "--dry-run")
    for words, out in {
        ("methods",): list(family.members("methods")),
        ("inspect", GOOD, GOOD): [digest, digest],
        ("stack", GOOD, "-o", "stacked", "--force"): [str(here / "stacked.lprompt.safetensors")],
        plan: [str(here / "cat.lprompt.safetensors")],
    }.items():
        for quiet in (conceptzap("-q", *words), conceptzap(*words, "--quiet")):
            assert (quiet.code, quiet.err, quiet.out.splitlines()) == (0, "", out)
    assert conceptzap("attacks", "-q").out.split() == sorted(catalog.attack_names())
    assert conceptzap("attacks", "ring-a-bell", "-q").out.split()[:2] == ["eta", "tokens"]
    assert {"style", "object"} <= set(conceptzap("presets", "-q").out.split())
    settings = conceptzap("methods", "uce", "-q").out.split()
    assert "rank" in settings and all(name.isidentifier() for name in settings)


def test_quiet_still_says_what_is_wrong() -> None:
    assert conceptzap("methods", "nope", "-q").error.startswith("no method is called")


def test_what_was_asked_of_one_command_does_not_outlast_it() -> None:
    loud = conceptzap("methods")
    assert loud.err and conceptzap("methods", "-q", "--no-color").err == ""
    assert conceptzap("methods") == loud


def test_verbose_says_what_was_decided(here: Path) -> None:
    words = ("erase", "tree", "--method", closed_form(), "--base", "base", "--force")
    plain, loud = conceptzap(*words), conceptzap(*words, "-v")
    assert loud.code == plain.code == 0 and loud.out == plain.out
    decided = [f"method: {closed_form()}", "seed: 0", "base: sd1, epsilon, cpu float32", "loading base"]
    assert all(text in loud.err and text not in plain.err for text in decided)
    assert re.search(r"for \d+ layers in \d+ s(, at most .* of memory)?, seed 0, digest [0-9a-f]{12}\n", plain.err)
    drawn = conceptzap("generate", *DRAW, "--with", "tree.lprompt.safetensors", "-v")
    assert len(re.findall(r"images/a-cat-\d\.png: seed \d, ", drawn.err)) == 3


def test_details_show_every_step_and_no_progress_none(here: Path) -> None:
    def steps(*more: str) -> list[str]:
        answer = conceptzap("generate", *DRAW, *more)
        assert answer.code == 0 and answer.out.count(".png\n") == 3
        return re.findall(r"^\[\d+ s\] drawing (./3)", answer.err, re.MULTILINE)

    assert steps("-vv") == ["1/3", "2/3", "3/3"]
    assert steps() == steps("-v") == ["3/3"]
    assert steps("--no-progress") == steps("-q") == []


def test_a_log_gets_a_line_now_and_then(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptzap.terminal.progress.LINE_EVERY", 0.0)
    monkeypatch.setattr(Pulse, "_wait", lambda _: None)  # what it says in between comes by the clock
    lines = conceptzap("generate", *DRAW).err.splitlines()
    drawn = [line for line in lines if re.search(r"drawing [1-3]/3", line) and "step" not in line]
    assert [re.sub(r"[\d.]+(?=/s| s)", "N", line) for line in drawn] == [
        "[N s] drawing 1/3", "[N s] drawing 2/3 N/s, N s left", "[N s] drawing 3/3 N/s",
    ]  # fmt: skip


# stdin, the network, other pictures


def test_prompts_from_a_pipe(here: Path) -> None:
    words = ("generate", "--prompts", "-", "--steps", "1", "--base", "base", "--json", "-o", "piped")
    process = Program("", *words, stdin="\ufeffa cat\n\n  a dog\n", cwd=here)
    assert process.wait() == 0, process.err
    assert re.findall(r'"prompt": "(.*?)"', process.out) == ["a cat", "a dog"]


def test_concepts_from_a_pipe_in_a_shell(here: Path) -> None:
    tool = f"{sys.executable} -m conceptzap"
    line = f"printf 'cat\\ndog\\n' | {tool} erase @- --dry-run --json | {tool} inspect /dev/stdin; echo $?"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=here)
    assert done.stdout == "3\n", "the plan is no erasure"
    plan = subprocess.run(["sh", "-c", line.partition(" | " + tool + " inspect")[0]],
                          capture_output=True, text=True, cwd=here)  # fmt: skip
    assert '"concepts": ["cat", "dog"]' in plan.stdout and plan.stderr == ""


@pytest.mark.parametrize("line", ["{} <&-", "printf '\\377' | {}"])
def test_a_pipe_that_cannot_be_read(line: str, here: Path) -> None:
    line = line.format(f"{sys.executable} -m conceptzap generate --prompts -")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=here)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read -: ")
    assert done.stderr.count("\n") == 1


LOOKING = """
import socket, sys
def look_up(host, *_, **__):
    print("looked up", host, file=sys.stderr)
    raise OSError("nobody is there")
socket.getaddrinfo = look_up
"""


@pytest.mark.parametrize("offline", [(), ("--offline",), ("HF_HUB_OFFLINE",)])
def test_offline_asks_nobody(
    offline: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    options = [word for word in offline if word.startswith("-")]
    for name in set(offline) - set(options):
        monkeypatch.setenv(name, "1")
    process = Program(FRESH + LOOKING, "generate", "a cat", "--base", "nobody/nothing", *options, cwd=here)
    assert process.wait() == 5 and "hub cannot be reached" in process.err.splitlines()[-1], process.err
    assert ("looked up" in process.err) == (not offline)


HUB_BARS = """
import conceptzap.registry.catalog as catalog
def methods():
    from huggingface_hub.utils import are_progress_bars_disabled
    print(are_progress_bars_disabled())
    return []
catalog.methods = methods
"""


@pytest.mark.parametrize(("option", "off"), [("-q", True), ("--no-progress", True), ("-v", False)])
def test_the_hub_draws_no_bars_either(
    option: str, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    out, _ = program(HUB_BARS, "methods", option).communicate()
    assert out.splitlines()[0] == str(off)


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp", "deep/x.gif", "x.tiff"])
@pytest.mark.parametrize("command", [("generate", "a cat"), ("demo",)], ids=" ".join)
def test_pictures_are_png_or_nothing(command: tuple[str, ...], name: str, here: Path) -> None:
    before = contents(here)
    answer = conceptzap(*command, "-o", name)
    assert answer.code == 2 and "written as PNG" in answer.error and ".png" in answer.error
    assert contents(here) == before


# completion


def complete(line: str, folder: Path) -> list[str]:
    words = f"conceptzap {line}"
    asked = {
        "_CONCEPTZAP_COMPLETE": "complete_bash", "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "conceptzap"], capture_output=True, text=True, cwd=folder,
        env={**os.environ, **asked},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def test_files_are_completed_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c", "[odd]"):
        (tmp_path / name).with_suffix(".lprompt.safetensors").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.lprompt.safetensors").touch()
    (tmp_path / "model.safetensors").touch()
    ours = ("[odd].lprompt.safetensors", "a.lprompt.safetensors", "b.lprompt.safetensors")
    assert complete("inspect ", tmp_path) == list(ours)
    assert complete("inspect [", tmp_path) == [ours[0]]
    assert complete("stack sub/", tmp_path) == ["sub/c.lprompt.safetensors"]
    assert complete(f"lock {tmp_path}/a", tmp_path) == [f"{tmp_path}/{ours[1]}"]
    assert complete("stack nowhere/", tmp_path) == []


def test_the_completion_script_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    program_of.cache_clear()  # what is built depends on it
    answer = conceptzap("--show-completion", "bash")
    program_of.cache_clear()
    assert answer.code == 0 and answer.err == "" and "_CONCEPTZAP_COMPLETE=complete_bash" in answer.out


# terminals

COUNTING = """
import conceptzap.registry.catalog as catalog
from conceptzap.terminal.progress import Progress
real = catalog.methods
def methods():
    report = Progress()
    report.phase("looking")
    return list(report.count(real(), len(real()), "reading"))
catalog.methods = methods
"""
COLOUR, BAR = "\x1b[1m", "\x1b[?25l"


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *words: str, **environment: str) -> str:
    """What the program writes to a terminal that is both its stdout and its stderr."""
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(catalog, "methods", catalog.methods)  # which is put back at the end
    exec(COUNTING, {})  # noqa: S102
    near, far = pty.openpty()
    text: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(near, 65536):
                text.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(far, "w", encoding="utf-8") as terminal:
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            code = main(list(words))
    reader.join()
    os.close(near)
    assert code == 0
    return b"".join(text).decode()


@pytest.mark.parametrize(
    ("words", "environment", "coloured", "moving"),
    [
        ((), {}, True, True),
        (("--no-color",), {}, False, True),
        (("--no-progress",), {}, True, False),
        (("-q",), {}, False, False),
        ((), {"NO_COLOR": "1"}, False, True),
        ((), {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, True),
        ((), {"TERM": "dumb"}, False, False),
        ((), {"CI": "true"}, True, False),
    ],
)
def test_colour_and_bars_on_a_terminal(
    words: tuple[str, ...], environment: dict[str, str], coloured: bool, moving: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    text = on_a_terminal(monkeypatch, "methods", *words, **environment)
    assert (COLOUR in text, BAR in text) == (coloured, moving)
    watched = "-q" not in words
    assert ("looking" in text) == watched
    counted = watched and "--no-progress" not in words
    assert ("s] reading" in text) == counted, "the last line of the bar stays"


@pytest.mark.parametrize("force", ["", "1"])
def test_no_terminal_no_bars(force: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", force)
    process = Program(COUNTING, "methods")
    assert process.wait() == 0
    out, err = process.out, process.err
    assert (COLOUR in out) == bool(force) and BAR not in out + err
    assert "looking" not in err and "s] reading" in err
    for words in (["--help"], ["doctor"]):
        assert force or "\x1b" not in conceptzap(*words).out


@pytest.mark.parametrize(
    "words", [("methods",), ("presets",), ("doctor",), ("inspect", GOOD), ("erase", "--help")]
)
def test_other_encodings_get_ascii(
    words: tuple[str, ...], here: Path
) -> None:
    process = Program("", *words, cwd=here, PYTHONIOENCODING="ascii")
    assert process.wait() == 0, process.err
    said = process.out + process.err
    assert said.isascii() and "\\u" not in said


def test_streams_that_python_opened_for_ascii_get_ascii(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = program("", "inspect", GOOD, cwd=here)
    out, err = process.communicate()
    assert process.returncode == 0 and (out + err).isascii() and "\\u" not in out + err


@pytest.mark.parametrize("columns", [40, 200])
@pytest.mark.parametrize("words", [("methods",), ("presets",), ("inspect", GOOD), ("doctor",)])
def test_tables_fit_narrow_and_wide_terminals(
    words: tuple[str, ...], columns: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is wider than the terminal, and nothing is left out: a narrow one gets lists."""
    monkeypatch.setenv("COLUMNS", "1000")
    whole = conceptzap(*words).out
    monkeypatch.setenv("COLUMNS", str(columns))
    fitted = conceptzap(*words)
    assert fitted.code == 0 and max(map(len, fitted.out.splitlines())) <= columns
    dense = re.sub(r"[\s─]", "", fitted.out)
    if columns >= NARROW:
        assert sorted(dense) == sorted(re.sub(r"[\s─]", "", whole))
        return
    lines, end = whole.splitlines(), 0
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        heads = "─" in below
        for cell in re.split(r"\s{2,}", line.strip(" ─\n")):
            text = re.sub(r"\s", "", cell)
            if heads:
                assert not text or f"{text}:" in dense, f"the head {cell!r} is nowhere"
            else:
                assert text in dense[end:], f"{cell!r} is missing or out of order"
                end = dense.index(text, end) + len(text)


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_too(name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [name, "--help"] if name else ["--help"]
    monkeypatch.setenv("COLUMNS", columns)
    answer = conceptzap(*words)
    assert answer.code == 0 and "Usage: conceptzap" in answer.out
