"""A method's settings: its frozen dataclass, overlaid by preset, config file and `--set`."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from conceptzap.errors import UsageError
from conceptzap.registry.family import suggest
from conceptzap.words import with_article

PACKAGE = Path(__file__).parents[1]
# a wheel carries the presets inside the package; in a checkout they lie beside it, at the top
PRESETS = next(
    (place for place in (PACKAGE / "presets", PACKAGE.parent / "presets") if any(place.glob("*.toml"))),
    PACKAGE / "presets",
)
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_sets(pairs: typing.Iterable[str]) -> dict[str, str]:
    """`["lr=1e-3"]` -> `{"lr": "1e-3"}`; the text after the first `=` is the value."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {pair!r} is not key=value", "for example: --set steps=200")
        result[key.strip()] = value.strip()
    return result


def convert(name: str, value: Any, kind: Any) -> Any:
    """A TOML value or the text of `--set`, as the field's type; raises `UsageError` otherwise."""
    try:
        if kind is bool:
            return _boolean(value)
        if kind in (int, float, str):
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError
            result = kind(value)
            if kind is float and not math.isfinite(result):
                raise ValueError
            return result
    except ValueError:
        pass
    else:
        raise TypeError(f"config field {name} has a type that cannot be set: {kind}")
    what = with_article(kind.__name__)
    raise UsageError(f"{name}={value!r} is not {what}", f"give {name} {what}")


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise ValueError
    return text in TRUE


def resolve(cls: type, *layers: Mapping[str, Any]) -> Any:
    """An instance of the frozen dataclass `cls`: its defaults, then each layer over the last."""
    kinds = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in known:
                raise UsageError(f"unknown setting {key!r}", suggest(key, known))
            values[key] = convert(key, value, kinds[key])
    return cls(**values)


def share(default: float) -> Any:
    """A setting that is a share: from 0 to 1."""
    return dataclasses.field(default=default, metadata={"most": 1})


def tokens(default: int) -> Any:
    """A setting that is a number of tokens in a text: no more than the base's encoders read."""
    return dataclasses.field(default=default, metadata={"tokens": True})


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; missing or malformed is a `UsageError` that names the line."""
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "name a readable TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}", "correct that line") from error


def place(path: Path, key: str) -> str:
    """`c.toml:3`: the line of a TOML file that sets a key."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(rf"[\s\[\"']*{re.escape(key)}[\"'\s=.\]]", line):
            return f"{path}:{number}"
    return str(path)


def to_toml(table: Mapping[str, Any]) -> bytes:
    """A table of texts, numbers, lists of texts, and tables of these as a TOML file."""
    import tomli_w

    try:
        return tomli_w.dumps(table).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("a name that is not UTF-8 cannot be saved as TOML", "rename it") from error


def preset_names(folder: str = "") -> list[str]:
    return sorted(path.stem for path in (PRESETS / folder).glob("*.toml"))


def preset(name: str, folder: str = "") -> dict[str, Any]:
    """A preset shipped in the package, by name."""
    if name not in preset_names(folder):
        raise UsageError(f"no preset is called {name!r}", suggest(name, preset_names(folder)))
    return copy.deepcopy(_shipped(PRESETS / folder / f"{name}.toml"))


@cache
def _shipped(path: Path) -> dict[str, Any]:
    """What is shipped is read once: a run asks for it some ten times."""
    return read_toml(path)


@cache
def demo_words() -> frozenset[str]:
    """Every word of the captions that the built-in checkpoint learned from, whatever its tokens."""
    return frozenset((PACKAGE / "demo" / "words.txt").read_text(encoding="utf-8").split())


def kept_words(table: Mapping[str, Any]) -> tuple[str, ...]:
    """All words that a preset keeps: the concepts of its own kind (`names`), and the rest (`keep`)."""
    return (*table.get("names", ()), *table.get("keep", ()))
