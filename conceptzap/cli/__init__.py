"""The command line. A file in this folder is a command; the file's name is the command's.

A command module has a docstring (first line: what it does; then two runnable examples) and `run`,
whose annotated parameters are the options: parse, one call into `api`, one call into `show`. Heavy
imports stay inside `run`. Nothing else is needed to add a command.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any

import typer

from conceptzap.cli import _errors, _everywhere
from conceptzap.registry import family
from conceptzap.terminal import speech

PROGRAM = "conceptzap"
ORDER = (  # by use: everyday, measured, carried elsewhere, guarded, told
    "erase", "generate", "stack", "inspect", "ui",
    "evaluate", "compare", "attack", "harden", "bench",
    "export", "import", "push", "lock", "verify",
    "demo", "methods", "attacks", "presets", "cite", "doctor",
)  # fmt: skip
HELP = """Erase concepts from Stable Diffusion: a frozen checkpoint and one small file.

\b
Examples:
  conceptzap erase "Van Gogh" --anchor painting
  conceptzap generate "a cat by Van Gogh" --with van-gogh --compare

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 bad
erasure file, 4 made for another base, 5 memory, disk or device, 6 refused, 7 not good enough.

The options -q to --debug may also follow the command.
"""


def build(only: str = "") -> typer.Typer:
    """The Typer application with every command of this folder, or with the one that is named."""
    app = typer.Typer(
        cls=_everywhere.Program,
        help=HELP,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    for name in [only] if only else sorted(family.files("cli"), key=_position):
        module = importlib.import_module(f"{__name__}.{name}")
        text = _with_examples(module.__doc__ or "")
        app.command(name, cls=_everywhere.Command, help=text)(module.run)
    return app


@cache
def program(only: str = "") -> Any:
    """The application as the command that runs, built once a process: it holds nothing of a call.

    Reading the options of all commands is most of a start, so that one that is named is built alone.
    """
    return _everywhere.share(typer.main.get_command(build(only)))


def _position(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def _with_examples(doc: str) -> str:
    """The docstring with its indented lines under "Examples:", kept from being wrapped."""
    summary, _, rest = doc.partition("\n\n")
    examples = [line.strip() for line in rest.splitlines() if line.startswith("    ")]
    prose = [line for line in rest.splitlines() if not line.startswith("    ")]
    shown = "\n".join(["\b", "Examples:", *(f"  {line}" for line in examples)])
    return "\n\n".join([summary, shown, "\n".join(prose).strip()])


def _version(wanted: bool) -> None:
    if wanted:
        from conceptzap.terminal import environment

        print(environment.version_line())
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
    quiet: _everywhere.Quiet = False,
    verbose: _everywhere.Verbose = 0,
    no_progress: _everywhere.NoProgress = False,
    no_color: _everywhere.NoColour = False,
    offline: _everywhere.Offline = False,
    debug: _everywhere.Debug = False,
) -> None:
    """What these ask for is done as they are read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; whatever goes wrong is answered in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _mend_streams()
    speech.begin()
    given = _options_of(words)
    debug = "--debug" in given or os.environ.get("CONCEPTZAP_DEBUG", "0") not in ("", "0")
    named = next((word for word in given if word in ORDER), "")
    command = f"{PROGRAM} {named}".rstrip()
    reply = _errors.Reply(as_json="--json" in given, debug=debug, command=command)
    _hush_libraries()
    with _sigterm_unwinds():
        try:
            first = next((word for word in given if not word.startswith("-")), "")
            command = program(first if first in family.files("cli") else "")
            _everywhere.check_values(command, given)
            code = command.main(words, prog_name=PROGRAM, standalone_mode=False)
            sys.stdout.flush()
        except BaseException as error:  # the one place that turns an error into an answer
            return reply.to(error)
    return reply.to(KeyboardInterrupt()) if code == _errors.SIGINT_CODE else int(code or 0)


def _hush_libraries() -> None:
    """Libraries say what is wrong by raising it; what they log is for their developers.

    Nor do they tell anybody about this machine: the hub's client would, at its first request.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _options_of(words: list[str]) -> list[str]:
    return words[: words.index("--")] if "--" in words else words


def _mend_streams() -> None:
    """Closed streams become /dev/null; what an encoding cannot say is escaped, never an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM raises `SystemExit`, so that temporary files go and hooks come off on the way out."""

    def stop(*_: object) -> None:
        raise SystemExit(_errors.SIGTERM_CODE)

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its owner decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
