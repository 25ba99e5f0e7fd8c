"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from conceptzap.errors import UsageError
from conceptzap.format import naming
from conceptzap.registry import config, family

MAX_STRENGTH = 2.0
STDIN = "-"
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")


# completion: without torch, without reading any file


def _starting(names: Sequence[str], typed: str) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def _methods(incomplete: str) -> list[str]:
    return _starting(list(family.members("methods")), incomplete)


def _presets(incomplete: str) -> list[str]:
    return _starting(config.preset_names(), incomplete)


def _erasures(incomplete: str) -> list[str]:
    folder, slash, start = incomplete.rpartition("/")
    names: list[str] = []
    with suppress(OSError):
        names = _starting(sorted(os.listdir(folder + slash or ".")), start)
    return [folder + slash + name for name in names if name.endswith(naming.SUFFIX)]


# options of several commands


def usually(option: Any, default: object) -> Any:
    """The option, its help saying the default that applies when neither it nor a file says one."""
    shown = copy.copy(option)
    shown.help = f"{option.help}  [default: {default}]"
    return shown


def path(text: str | Path) -> Path:
    """A path that an option gives: `--out=~/x` reaches us as it was typed."""
    return naming.place(text)


def png(path: Path | None) -> Path | None:
    """An `--output` of pictures; `UsageError` for a file of another kind."""
    if path and Path(path).suffix.lower() in OTHER_PICTURES and not Path(path).is_dir():
        hint = f"for example: -o {Path(path).with_suffix('.png')}"
        raise UsageError(f"--output {str(path)!r}: pictures are written as PNG", hint)
    return path


BASE = typer.Option(
    "--base", metavar="B", help="demo, a hub id[@revision], a folder or a .safetensors file."
)
SEED = typer.Option("--seed", metavar="N", help="0 to 2^63-1.")
DEVICE = typer.Option("--device", metavar="D", help="auto, cpu, cuda, cuda:1 or mps.")
DTYPE = typer.Option("--dtype", metavar="T", help="auto, float32, float16 or bfloat16.")
Base = Annotated[str, BASE]
Seed = Annotated[int, SEED]
Device = Annotated[str, DEVICE]
Dtype = Annotated[str, DTYPE]
Prediction = Annotated[
    str | None,
    typer.Option("--prediction", metavar="P", help="epsilon or v_prediction, if no file says it."),
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", metavar="X", help="Guidance scale, 0 to 50.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse an erasure made on another checkpoint.")
]
METHOD = typer.Option(
    "--method", metavar="M", autocompletion=_methods, help="See `conceptzap methods`."
)
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="P", autocompletion=_presets, help="See `conceptzap presets`."
    ),
]
Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE", autocompletion=_erasures, show_default=False, parser=path,
        help="Erasures, with or without .lprompt.safetensors.",
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with", metavar="FILE[:STRENGTH]", autocompletion=_erasures,
        help="An erasure, at a strength of 0 to 2 (1). Repeatable.",
    ),
]


def words(items: Sequence[str] | None) -> list[str]:
    """A list option's values; `@file` stands for the lines of a file, `@@x` for a literal `@x`."""
    result: list[str] = []
    for item in items or ():
        if item.startswith("@@"):
            result.append(item[1:])
        elif item.startswith("@"):
            result.extend(lines(path(item[1:])))
        else:
            result.append(item)
    return result


def lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, `-` for stdin, without blank ones.

    Raises `UsageError` where it cannot be read.
    """
    piped = str(path) == STDIN
    try:
        with open(0 if piped else path, encoding="utf-8-sig", closefd=not piped) as stream:
            text = stream.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}", "name a text file, one a line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def erasure(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`. A file whose whole name exists is taken as it stands."""
    head, colon, tail = text.rpartition(":")
    whole = naming.existing(text)
    if not colon or whole.exists():
        return whole, 1.0
    found = naming.existing(head)
    try:
        strength = float(tail)
    except ValueError:
        if not found.exists():
            return whole, 1.0
        raise UsageError(f"strength {tail!r} is not a number", f"for example: {head}:0.8") from None
    if not (math.isfinite(strength) and 0 <= strength <= MAX_STRENGTH):
        raise UsageError(f"strength {tail} of {head} is out of range", "use 0 to 2")
    return found, strength


def layered(path: Path | None, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What was given, over what a `--config` file says, over the defaults.

    The file's keys are those of `given`, where None or an empty list is "not given"; its table
    `set` holds settings of the method. Raises `UsageError` for an unknown key or a value of
    another type.
    """
    table = config.read_toml(path) if path else {}
    for key, value in table.items():
        if key not in given:
            place = config.place(path, key)
            raise UsageError(f"{place}: unknown key {key!r}", family.suggest(key, given))
        _check_kind(path, key, value)
    merged = {key: value for key, value in given.items() if value is not None and value != []}
    if "set" in merged:
        merged["set"] = {**table.get("set", {}), **merged["set"]}
    return {**dict.fromkeys(given), **defaults, **table, **merged}


def _check_kind(path: Path | None, key: str, value: Any) -> None:
    wanted = {"anchor": list, "keep": list, "set": dict, "seed": int, "steps": int}.get(key, str)
    items = value if isinstance(value, list) else []
    if type(value) is not wanted or not all(isinstance(item, str) for item in items):
        kind = {list: "list of texts", dict: "table", int: "whole number", str: "text"}[wanted]
        place = config.place(path, key)
        raise UsageError(f"{place}: {key} = {value!r} is not a {kind}", f"mend {key} in that file")
