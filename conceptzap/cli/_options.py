"""Options that several commands share, and how their text is read."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from conceptzap.errors import UsageError
from conceptzap.registry import config, family

MAX_STRENGTH = 2.0
STDIN = "-"
COUNTS = ("seed", "steps", "patience", "limit", "sample_every")  # whole numbers; the others are texts
KINDS = {list: "list of texts", dict: "table", int: "whole number", str: "text", bool: "truth value"}
LISTS = ("concepts", "anchor", "keep", "kind", "after", "log_with")  # keys of a --config file: lists of texts
PATHS = ("output", "run_dir")  # texts that name a place, one of them
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")


# completion: without torch, without reading any file


def _starting(names: Sequence[str], typed: str) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def _methods(incomplete: str) -> list[str]:
    return _starting(list(family.members("methods")), incomplete)


def _presets(incomplete: str) -> list[str]:
    return _starting(config.preset_names(), incomplete)


def _budgets(incomplete: str) -> list[str]:
    from conceptzap.verbs.planning import BUDGETS

    return _starting(BUDGETS, incomplete)


def _hardening(incomplete: str) -> list[str]:
    from conceptzap.verbs.planning import BUDGETS, PLAIN

    return _starting([*BUDGETS, PLAIN], incomplete)


def _erasures(incomplete: str) -> list[str]:
    from conceptzap.format import naming

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
    """A path that an option gives: `--out=~/x` reaches us as it was typed. Names on the hub are checked."""
    from conceptzap.format import naming, remote

    return Path(str(remote.parse(text))) if remote.is_name(text) else naming.place(text)


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
    typer.Option("--prediction", metavar="P",
                 help="epsilon or v_prediction, where the base does not say it."),
]
SuiteSteps = Annotated[
    int | None, typer.Option("--steps", metavar="N", help="Sampling steps.  [default: the suite's]")
]
SuiteBatch = Annotated[
    int | None, typer.Option("--batch", metavar="N", help="Batch size.  [default: the suite's]")
]
FailOver = Annotated[
    list[str] | None,
    typer.Option("--fail-over", metavar="ASR=10",
                 help="The most, in percent, that ASR, before or newly may be; else exit 7. Repeatable."),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="At most N pictures of a prompt group.  [default: all]"),
]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", metavar="J",
                 help="A classifier: demo, clip:MODEL, imagenet:FILE, nudenet, module:function. Repeatable."),
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", metavar="X", help="Guidance scale, 0 to 50.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
SettingsOf = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Show the settings of this one.", show_default=False),
]
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
        help="Erasures, with or without .lprompt.safetensors; hf://user/repo/file from the hub.",
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with", metavar="FILE[:STRENGTH]", autocompletion=_erasures,
        help="An erasure, here or hf://user/repo/file, at a strength of 0 to 2 (1). Repeatable.",
    ),
]


def words(items: Sequence[str] | None) -> list[str]:
    """A list option's values; `@file` stands for the lines of a file, `@@x` for a literal `@x`.

    Lines of the file that begin with # are remarks.
    """
    result: list[str] = []
    for item in items or ():
        if item.startswith("@@"):
            result.append(item[1:])
        elif item.startswith("@"):
            result.extend(line for line in lines(path(item[1:])) if not line.startswith("#"))
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
    from conceptzap.format import naming, remote

    head, colon, tail = text.rpartition(":")
    whole = Path(text) if remote.is_name(head) else naming.existing(text)
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
    `set` holds settings of the method, and one text may stand for a list of one. A place that is given is
    instead of any place in the file. Raises `UsageError` for an unknown key or a value of another type.
    """
    from conceptzap.format import naming

    table = config.read_toml(path) if path else {}
    for key, value in table.items():
        if key not in given:
            place = config.place(path, key)
            raise UsageError(f"{place}: unknown key {key!r}", family.suggest(key, given))
        if key in LISTS and isinstance(value, str):
            table[key] = [value]
        _check_kind(path, key, table[key])
        if key in PATHS:
            table[key] = naming.place(value)
    merged = {key: value for key, value in given.items() if value is not None and value != []}
    if merged.keys() & set(PATHS):
        table = {key: value for key, value in table.items() if key not in PATHS}
    if "set" in merged:
        merged["set"] = {**table.get("set", {}), **merged["set"]}
    return {**dict.fromkeys(given), **defaults, **table, **merged}


def _check_kind(path: Path | None, key: str, value: Any) -> None:
    kinds = {**dict.fromkeys(LISTS, list), **dict.fromkeys(COUNTS, int), "set": dict, "preview": bool}
    wanted = kinds.get(key, str)
    items = value if isinstance(value, list) else []
    if type(value) is not wanted or not all(isinstance(item, str) for item in items):
        kind = KINDS[wanted]
        place = config.place(path, key)
        raise UsageError(f"{place}: {key} = {value!r} is not a {kind}", f"correct {key} in that file")


def size(text: str | None, width: int | None, height: int | None) -> dict[str, int | None]:
    """`--size 768x512`, or one side by `--width` or `--height`, which win; `UsageError` otherwise."""
    if text is None:
        return {"width": width, "height": height}
    found = re.fullmatch(r"(\d{1,5})(?:[xX*](\d{1,5}))?", text.strip())
    if not found:
        raise UsageError(f"--size {text!r} is not WIDTHxHEIGHT", "for example: --size 768x512")
    wide, high = (int(side or found[1]) for side in found.groups())
    return {"width": width or wide, "height": height or high}


def strengths(text: str | None) -> tuple[float, ...]:
    """The numbers of `--sweep 0,.25,.5,1`, () for none given; `UsageError` for what is none."""
    try:
        found = tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        hint = "for example: --sweep 0,.25,.5,1"
        raise UsageError(f"--sweep {text!r} is not a list of strengths", hint) from None
    if not all(math.isfinite(one) and 0 <= one <= MAX_STRENGTH for one in found):
        raise UsageError(f"--sweep {text} is out of range", "use strengths of 0 to 2")
    return found


def check_quotes(prompts: Sequence[str]) -> str:
    """What to say of several prompts that look like the words of one; "" of any others."""
    if len(prompts) < 2 or any(set(prompt) & set(" @") or not prompt for prompt in prompts):
        return ""
    return f"{len(prompts)} prompts of one word each; for one, quote it: \"{' '.join(prompts)}\""
