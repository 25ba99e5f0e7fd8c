"""Options of the program itself, heard before a command's name and after it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from conceptzap.errors import UsageError
from conceptzap.terminal import speech as show


def _asking(variable: str = "", **wishes: int) -> Callable[[bool], None]:
    """A flag that passes wishes on, and sets what the hub's client reads when it is imported."""

    def heard(wanted: bool) -> None:
        if wanted:
            show.ask(**wishes)
        if wanted and variable:
            os.environ[variable] = "1"

    return heard


def _detail(level: int) -> None:
    if level:
        show.ask(detail=level)


NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", expose_value=False, callback=_asking(NO_BARS, quiet=True),
                 help="Nothing on stderr but errors, on stdout but paths and names."),
]
Verbose = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, expose_value=False, callback=_detail,
                 show_default=False, help="More on stderr: what was decided; -vv: every step."),
]
NoProgress = Annotated[
    bool,
    typer.Option("--no-progress", expose_value=False, callback=_asking(NO_BARS, progress=False),
                 help="No bars and no counting."),
]
NoColour = Annotated[
    bool,
    typer.Option("--no-color", expose_value=False, callback=_asking(colour=False),
                 help="Plain text."),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", expose_value=False, callback=_asking("HF_HUB_OFFLINE"),
                 help="Nothing from the network, like HF_HUB_OFFLINE=1."),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", expose_value=False,
                 help="Show the traceback of an error, like CONCEPTZAP_DEBUG=1."),
]
EVERYWHERE = ("quiet", "verbose", "no_progress", "no_color", "offline", "debug")


class Program(TyperGroup):
    """A flag that nobody gave is False: for a None typer loads pydantic, half of a start's time."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False) and param.default is None:
                param.default = False
        return params


# options, by their parameters, that stand last in any command's help
SELDOM = frozenset(
    "batch device dtype height limit log_with prediction sample_every sampler save_config set_"
    " strict toml width".split()
)


class Command(TyperCommand):
    """Its help has the options in groups, what is seldom needed last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Advanced": []}
        for param in self.get_params(ctx):
            name, text = param.get_help_record(ctx) or ("", "")
            if param.param_type_name == "argument":
                groups["Arguments"].append((param.display_name_raw, text))
            elif name:
                groups["Advanced" if param.name in SELDOM else "Options"].append((name, text))
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class Counted(TyperOption):
    """An option that the parser counts; it needs no pydantic either to know a number."""

    def process_value(self, ctx: Any, value: Any) -> Any:
        return self.callback(ctx, self, value) if self.callback else value


def share(program: Any) -> Any:
    """The program, its own options heard after every command too, whose help leaves them out."""
    program.params = [_counted(param) if param.count else param for param in program.params]
    own = [copy.copy(param) for param in program.params if param.name in EVERYWHERE]
    for param in own:
        param.hidden = True
    for command in program.commands.values():
        command.params.extend(own)
    return program


def _counted(param: Any) -> Counted:
    return Counted(
        param_decls=[param.name, *param.opts], type_descriptor=param.type_descriptor, count=True,
        default=0, callback=param.callback, expose_value=param.expose_value, help=param.help,
    )  # fmt: skip


def check_values(program: Any, words: Sequence[str]) -> None:
    """Raise `UsageError` where an option stands as another's value: `--anchor --dry-run`.

    With `=` it may: `--anchor=--dry-run`.
    """
    name = next((word for word in words if not word.startswith("-")), "")
    params = [*program.params, *getattr(program.commands.get(name), "params", ())]
    options = [param for param in params if getattr(param, "param_type_name", "") == "option"]
    known = {opt for param in options for opt in (*param.opts, *param.secondary_opts)}
    known |= {"--help", "-h"}
    taking = {opt for one in options if not (one.is_flag or one.count) for opt in one.opts}
    for option, value in zip(words, words[1:], strict=False):
        if option in taking and value.partition("=")[0] in known:
            hint = f"if it is meant as a value: {option}={value}"
            raise UsageError(f"{option} is followed by the option {value}", hint)
