"""Results of `conceptzap attack` that a policy asks for, of its files on its base, under limits. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptzap.edit import BaseRef, Json
from conceptzap.errors import FormatError, UsageError, escape
from conceptzap.evaluation import verdict
from conceptzap.format.atomic import read_regular

SCHEMA, RESULT = "conceptzap.attack/1", "result.json"
RATES = {"ASR": "asr", "before": "before", "newly": "newly"}  # as --fail-over and as a result calls them
LIMIT = 2**24  # bytes of a result


@dataclass(frozen=True)
class Attested:
    """One result: `path` from the lock's folder, sha256 of its bytes, which attack it is of.

    `limits`: rate -> the largest share that it may be, at least one.
    """

    path: str
    sha256: str
    attack: str
    limits: Mapping[str, float]

    def record(self) -> dict[str, Json]:
        return {**vars(self), "limits": dict(self.limits)}


def asked(results: Iterable[Path | str], pairs: Iterable[str]) -> tuple[list[Path], dict[str, float]]:
    """Results and the limits of their rates, `["ASR=10"]`; `UsageError` for the one without the other."""
    paths = [Path(path) for path in results]
    limits = verdict.percentages("--fail-over", pairs, [*RATES], "rate")
    if bool(paths) != bool(limits):
        hint = "for example: --attacked van-gogh-inversion --fail-over ASR=10"
        raise UsageError("results and limits of attacks come together", hint)
    return paths, limits


def located(path: Path) -> Path:
    """The result itself, where the folder of an attack was named."""
    return path / RESULT if path.is_dir() else path


def attest(name: str, path: Path, limits: Mapping[str, float]) -> Attested:
    """The result at `path` as a lock calls it; `UsageError` for what is no result of an attack."""
    data = _bytes(path)
    return Attested(name, hashlib.sha256(data).hexdigest(), str(_parse(path, data)["attack"]), limits)


def faults(
    one: Attested, path: Path, base: BaseRef, digests: Iterable[str], concepts: Iterable[str]
) -> list[str]:
    """Why a result does not show what is asked of it, for these erasures and concepts on `base`."""
    name = escape(one.path)
    try:
        data = _bytes(path)
        result = _parse(path, data)
    except UsageError as error:
        return [str(error)]
    if hashlib.sha256(data).hexdigest() != one.sha256:
        return [f"{name} is not the result that was locked (sha256)"]
    reasons = []
    if {file["digest"] for file in result["subject"]["files"]} != set(digests):
        reasons.append(f"{name} attacked other files")
    if any(file["strength"] != 1 for file in result["subject"]["files"]):
        reasons.append(f"{name} attacked them at another strength than 1")
    if result["base"]["fingerprint"] != dict(base.fingerprint):
        reasons.append(f"{name} attacked another base")
    subject = result["subject"]
    words = {word for some in subject.get("words", {}).values() for word in some}
    tried = {concept.casefold() for concept in (*subject["concepts"], *words)}
    if missed := sorted(concept for concept in concepts if concept.casefold() not in tried):
        reasons.append(f"{name} did not ask for {escape(', '.join(missed))}")
    if result["control"]:
        reasons.append(f"{name} is a control, {one.attack}, and no attack")
    if result.get("only"):
        reasons.append(f"{name} left forms of {one.attack} out")
    return reasons + [f"{name}: {over}" for over in _over(one, result)]


def _over(one: Attested, result: Mapping[str, Any]) -> Iterable[str]:
    for rate, most in one.limits.items():
        found = result[RATES[rate]]
        if found["value"] > most:
            yield f"{rate} of {one.attack} is {found['value']:.1%} of {found['n']}, over {most:.1%}"


def parse(table: Mapping[str, Json]) -> Attested:
    """What a lock says of one, its types checked already; `ValueError` where it cannot be meant."""
    limits = table["limits"]
    if not limits or not set(limits) <= set(RATES):
        raise ValueError(f"limits of {table['path']!r} are not of {', '.join(RATES)}")
    if not all(type(most) in (int, float) and 0 <= most <= 1 for most in limits.values()):
        raise ValueError(f"limits of {table['path']!r} are no shares from 0 to 1")
    return Attested(**table)


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path, LIMIT)
    except FormatError as error:
        raise UsageError(str(error), error.hint) from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    """A result with all that is asked of it."""
    try:
        tree = json.loads(data)
        if tree["schema"] != SCHEMA:
            raise ValueError
        _check(tree["subject"]["files"], ("digest", "strength"))
        _check([tree[name] for name in RATES.values()], ("value", "n"))
        concepts, kinds = tree["subject"]["concepts"], {"attack": str, "control": bool}
        words = [word for some in tree["subject"].get("words", {}).values() for word in some]
        if type(tree["base"]["fingerprint"]) is not dict:
            raise ValueError
        if any(type(one) is not str for one in [*concepts, *words]):
            raise ValueError
        if any(type(tree[name]) is not kind for name, kind in kinds.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{escape(path)} is no result of an attack", "give its result.json") from error
    return tree


def _check(tables: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """`KeyError` or `TypeError` unless each has these keys, with numbers behind all but a digest."""
    for table in tables:
        for key in keys:
            if not isinstance(table[key], str if key == "digest" else (int, float)):
                raise TypeError
