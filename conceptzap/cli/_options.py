"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from conceptzap import config, family
from conceptzap.errors import UsageError

MAX_STRENGTH = 2.0


def _starting(names: Sequence[str], typed: str) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def _methods(incomplete: str) -> list[str]:
    return _starting(list(family.members("methods")), incomplete)


def _presets(incomplete: str) -> list[str]:
    return _starting(config.preset_names(), incomplete)


def _erasures(incomplete: str) -> list[str]:
    return [str(path) for path in Path().glob(f"{incomplete}*.lprompt.safetensors")]


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
Method = Annotated[
    str | None,
    typer.Option(
        "--method", metavar="M", autocompletion=_methods, help="See `conceptzap methods`."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="P", autocompletion=_presets, help="See `conceptzap presets`."
    ),
]
Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE", autocompletion=_erasures, help=".lprompt.safetensors files.",
        show_default=False,
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
            result.extend(lines(Path(item[1:])))
        else:
            result.append(item)
    return result


def lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file without blank ones; a `UsageError` if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}", "name a text file, one a line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def erasure(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`. A file whose whole name exists is taken as it stands."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(tail)
    except ValueError:
        if not Path(head).exists():
            return Path(text), 1.0
        raise UsageError(f"strength {tail!r} is not a number", f"for example: {head}:0.8") from None
    if not (math.isfinite(strength) and 0 <= strength <= MAX_STRENGTH):
        raise UsageError(f"strength {tail} of {head} is out of range", "use 0 to 2")
    return Path(head), strength


def layered(path: Path | None, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What was given, over what a `--config` file says, over the defaults.

    The file's keys are those of `given`, where None or an empty list is "not given"; its table `set`
    holds settings of the method. Raises `UsageError` for an unknown key or a value of another type.
    """
    table = config.read_toml(path) if path else {}
    for key, value in table.items():
        if key not in given:
            raise UsageError(f"{path}: unknown key {key!r}", family.suggest(key, given))
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
        raise UsageError(f"{path}: {key} = {value!r} is not a {kind}", f"mend {key} in that file")
