"""`conceptzap.lock`: which erasures have to be in force on which base, pinned by digest. No torch.

A policy holds whole or not at all. Nothing weakens it: no strength, no key, no environment
variable. Whoever wants another policy writes another file, whose digest is then in every picture.
Under version control it also tells a substituted or older file from the right one.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from conceptzap import format
from conceptzap.edit import BaseRef, Erasure, Json
from conceptzap.errors import FormatError, RefusedError, UsageError, escape
from conceptzap.format.atomic import read_regular, write_atomic
from conceptzap.format.container import FILE_LIMIT
from conceptzap.format.tree import DIGEST

if TYPE_CHECKING:
    from conceptzap.base import Base

SCHEMA = "conceptzap.lock/1"
NAME = "conceptzap.lock"
LIMIT = 2**20
# a policy pins every part of a fingerprint, also those that no edit touches
PARTS = ("attn2", "text", "unet")
EVERYTHING = ("unet",)
TOP = {"schema": str, "conceptzap": str, "base": dict, "files": list}
BASE = {
    "name": str,
    "family": str,
    "id": str,
    "revision": str,
    "signature": str,
    "fingerprint": dict,
}
FILE = {"path": str, "sha256": str, "digest": str, "concepts": list, "required": bool}
ANEW = "write it anew with: conceptzap lock"


@dataclass(frozen=True)
class Pinned:
    """One erasure file: `path` from the lock's folder, sha256 of its bytes, digest, concepts.

    One that is not `required` may be absent; a file that is there has to be the right one.
    """

    path: str
    sha256: str
    digest: str
    concepts: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True)
class Policy:
    """A lock file as read. `digest` is the sha256 of its bytes, `base_name` what `load_base` takes.

    `versions` is a range such as ">=0.1.0,<0.2" (PEP 440).
    """

    path: Path
    digest: str
    versions: str
    base_name: str
    base: BaseRef
    files: tuple[Pinned, ...]

    def locate(self, pinned: Pinned) -> Path:
        return _folder(self.path) / pinned.path


def write(
    path: Path, base: BaseRef, base_name: str, files: Iterable[Path], force: bool = False
) -> Policy:
    """Pin these erasures on this base, given by `Base.reference(EVERYTHING)`; all are required.

    Raises `UsageError` (no files), `FormatError` (not an erasure), `RefusedError` (keys, scaled or
    foreign erasures) and what `write_atomic` raises.
    """
    if not (named := _named(path, files)):
        raise UsageError("nothing to lock", f"name at least one {format.SUFFIX} file")
    found = {name: _pin(name, file) for name, file in sorted(named.items())}
    pins = tuple(pinned for pinned, _ in found.values())
    reasons = [r for pinned, erasure in found.values() for r in _unfit(base, pinned, erasure)]
    if reasons:
        raise _refused(f"cannot lock {escape(path)}", reasons)
    draft = Policy(Path(path), "", _range(), base_name, base, pins)
    data = _encode(draft)
    policy = _parse(Path(path), data)
    write_atomic(path, data, force)
    return policy


def read(path: Path) -> Policy:
    """A policy, every field checked; raises `UsageError` for one that is missing or malformed."""
    try:
        data = read_regular(path, LIMIT)
    except FormatError as error:
        raise UsageError(str(error), error.hint) from error
    return _parse(Path(path), data)


def faults(policy: Policy) -> list[str]:
    """Every reason why this policy does not hold here, one line each; bases are `check_base`'s."""
    return [*_wrong_version(policy), *(r for p in policy.files for r in _examine(policy, p))]


def verify_files(policy: Policy) -> list[Path]:
    """The files in force; raises `RefusedError` with every reason if any of it does not hold."""
    reasons = faults(policy)
    if reasons:
        raise _refused(f"{escape(policy.path)} does not hold", reasons)
    return [policy.locate(pinned) for pinned in _present(policy)]


def check_base(policy: Policy, base: Base) -> None:
    """Raise `RefusedError` unless `base` is the pinned checkpoint, architecture and weights."""
    prints = base.fingerprint(EVERYTHING)
    differing = [part for part in PARTS if prints.get(part) != policy.base.fingerprint[part]]
    reasons = [f"its {part} weights are others" for part in differing]
    if base.signature != policy.base.signature:
        reasons = ["it has another architecture"]
    if reasons:
        raise _refused(f"{escape(base.id)} is not the base {escape(policy.base_name)}", reasons)


def check_erasures(policy: Policy, erasures: Iterable[Erasure]) -> None:
    """Raise `RefusedError` unless these are what the policy pins: all of it, as made, and no more.

    They come one by one as `format.load` gave them: a stack has a digest of its own.
    """
    given = list(erasures)
    pins = {pinned.digest: pinned for pinned in policy.files}
    strange = [e for e in given if e.digest not in pins]
    reasons = [f"{escape(e.header.title)} is not in it" for e in strange]
    for erasure in given:
        reasons += _unlike(escape(erasure.header.title), erasure)
    digests = {erasure.digest for erasure in given}
    absent = [p for p in _present(policy) if p.digest not in digests]
    reasons += [f"{escape(pinned.path)} is not in force" for pinned in absent]
    if reasons:
        raise _refused(f"{escape(policy.path)} does not hold", reasons)


def enforce(policy: Policy, base: Base) -> list[Erasure]:
    """The erasures to attach once files and base are verified; raises `RefusedError`.

    The digest is taken again from the bytes that were loaded, so that a file exchanged after its
    check is noticed. Imports torch.
    """
    check_base(policy, base)
    try:
        erasures = [format.load(path) for path in verify_files(policy)]
    except FormatError as error:
        raise _refused(f"{escape(policy.path)} does not hold", [str(error)]) from error
    check_erasures(policy, erasures)
    return erasures


def _present(policy: Policy) -> list[Pinned]:
    return [p for p in policy.files if p.required or os.path.lexists(policy.locate(p))]


def _examine(policy: Policy, pinned: Pinned) -> list[str]:
    if pinned not in _present(policy):
        return []
    try:
        data = read_regular(policy.locate(pinned), FILE_LIMIT)
        if hashlib.sha256(data).hexdigest() != pinned.sha256:
            return [f"{escape(pinned.path)} is not the file that was locked (sha256)"]
        return _unfit(policy.base, pinned, format.parse(data))
    except FormatError as error:
        return [f"{escape(pinned.path)}: {error}"]


def _unfit(base: BaseRef, pinned: Pinned, erasure: Erasure) -> list[str]:
    name, made_on = escape(pinned.path), erasure.header.base
    reasons = _unlike(name, erasure)
    if erasure.digest != pinned.digest:
        reasons.append(f"{name} has the digest {erasure.digest[:12]}")
    if erasure.header.concepts != pinned.concepts:
        reasons.append(f"{name} is about {escape(', '.join(erasure.header.concepts))}")
    if made_on.signature != base.signature:
        reasons.append(f"{name} was made for another architecture, {escape(made_on.id)}")
    elif any(base.fingerprint.get(part) != value for part, value in made_on.fingerprint.items()):
        reasons.append(f"{name} was made on another checkpoint, {escape(made_on.id)}")
    return reasons


def _unlike(name: str, erasure: Erasure) -> list[str]:
    """What keeps an erasure out of any policy."""
    roles = sorted({edit.role for edit in erasure.edits} - {"erase"})
    reasons = [f"{name} holds an edit of the role {role!r}" for role in roles]
    scales = sorted({edit.scale for edit in erasure.edits} - {1.0})
    return reasons + [f"{name} has the strength {scale:g}, not 1" for scale in scales]


def _refused(what: str, reasons: Sequence[str]) -> RefusedError:
    return RefusedError(
        f"{what}: {'; '.join(reasons)}", "put back what was locked, or lock anew what is meant"
    )


def _wrong_version(policy: Policy) -> list[str]:
    from conceptzap import __version__

    if SpecifierSet(policy.versions).contains(__version__, prereleases=True):
        return []
    return [f"this is conceptzap {__version__}, it asks for {policy.versions}"]


def _range() -> str:
    """From this version to the last that only mends it: before 1.0 a minor version may break."""
    from conceptzap import __version__

    version = Version(__version__)
    following = str(version.major + 1) if version.major else f"0.{version.minor + 1}"
    return f">={__version__},<{following}"


def _folder(lock: Path) -> Path:
    # resolved, because `..` behind a link leads elsewhere than its name says
    return Path(os.path.realpath(lock.parent))


def _named(lock: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Path as the lock names it -> file; the same one twice counts once."""
    places = {
        Path(os.path.realpath(Path(file).parent)) / Path(file).name: Path(file) for file in files
    }
    folder = _folder(Path(lock))
    return {Path(os.path.relpath(place, folder)).as_posix(): file for place, file in places.items()}


def _pin(name: str, file: Path) -> tuple[Pinned, Erasure]:
    data = read_regular(file, FILE_LIMIT)
    try:
        erasure = format.parse(data)
    except FormatError as error:
        raise FormatError(f"{escape(file)}: {error}", error.hint) from error
    sha256 = hashlib.sha256(data).hexdigest()
    return Pinned(name, sha256, erasure.digest, erasure.header.concepts), erasure


def _encode(policy: Policy) -> bytes:
    lines = [
        "# Written by `conceptzap lock`, checked by `conceptzap verify`.",
        *_pairs({"schema": SCHEMA, "conceptzap": policy.versions}),
        *("", "[base]"),
        *_pairs({"name": policy.base_name, **policy.base.record()}),
        *("", "[base.fingerprint]"),
        *_pairs(policy.base.fingerprint),
    ]
    for pinned in policy.files:
        lines += ["", "[[files]]", *_pairs(vars(pinned))]
    try:
        return "\n".join([*lines, ""]).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"cannot lock {escape(policy.path)}: a name is not UTF-8", "rename it"
        ) from error


def _pairs(table: Mapping[str, Json]) -> list[str]:
    """`key = value` lines of a table's texts, lists of texts and truths."""
    return [f"{_key(k)} = {_value(v)}" for k, v in table.items() if not isinstance(v, dict)]


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else _quoted(key)


def _value(value: str | bool | Sequence[str]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    return f"[{', '.join(map(_quoted, value))}]"


def _quoted(text: str) -> str:
    """A TOML basic string; what does not print is written by its code point."""
    return f'"{"".join(map(_character, text))}"'


def _character(c: str) -> str:
    if c in '"\\':
        return f"\\{c}"
    if c.isprintable() or "\ud800" <= c <= "\udfff":
        return c
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


def _parse(path: Path, data: bytes) -> Policy:
    try:
        tree = tomllib.loads(data.decode("utf-8"))
        _check_schema(tree.get("schema"))
        top = _fields(tree, TOP, "it")
        _check_versions(top["conceptzap"])
        base = _fields(top["base"], BASE, "base")
        files = tuple(_file(table) for table in top["files"])
        reference = _reference(base)
        _check_files(files)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{escape(path)} is no sound policy: {escape(error)}", ANEW) from error
    digest = hashlib.sha256(data).hexdigest()
    return Policy(path, digest, top["conceptzap"], base["name"], reference, files)


def _check_schema(schema: Json) -> None:
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, this conceptzap reads {SCHEMA!r}")


def _fields(table: Json, kinds: Mapping[str, type], where: str) -> dict[str, Json]:
    """A table with exactly these keys and types, else a `ValueError`."""
    if type(table) is not dict:
        raise ValueError(f"{where} is not a table")
    odd = sorted(set(kinds) ^ set(table))
    if odd:
        raise ValueError(f"{where} {'lacks' if odd[0] in kinds else 'has an unknown'} {odd[0]!r}")
    for key, kind in kinds.items():
        if type(table[key]) is not kind:
            raise ValueError(f"{key} of {where} is not of type {kind.__name__}")
    return table


def _reference(base: Mapping[str, Json]) -> BaseRef:
    prints = _fields(base["fingerprint"], dict.fromkeys(PARTS, str), "base.fingerprint")
    for name, value in {"signature": base["signature"], **prints}.items():
        _check_digest(value, f"base: {name}")
    return BaseRef(base["family"], base["id"], base["revision"], base["signature"], prints)


def _file(table: Json) -> Pinned:
    fields = _fields(table, FILE, "a file")
    path, concepts = fields["path"], fields["concepts"]
    if not path.strip("./") or os.path.isabs(path) or "\0" in path:
        raise ValueError(f"{path!r} is no path from the policy's folder to a file")
    if not all(type(concept) is str for concept in concepts):
        raise ValueError(f"concepts of {path!r} are not texts")
    for name in ("sha256", "digest"):
        _check_digest(fields[name], f"{path}: {name}")
    return Pinned(**{**fields, "path": os.path.normpath(path), "concepts": tuple(concepts)})


def _check_digest(text: str, where: str) -> None:
    if not DIGEST.fullmatch(text):
        raise ValueError(f"{where} is not 64 hexadecimal digits")


def _check_versions(versions: str) -> None:
    if not list(SpecifierSet(versions)):
        raise ValueError("it gives no range of versions, such as '>=0.1,<0.2'")


def _check_files(files: Sequence[Pinned]) -> None:
    if not any(pinned.required for pinned in files):
        raise ValueError("it requires no file, so it would protect nothing")
    if len({pinned.path for pinned in files}) != len(files):
        raise ValueError("it names a file twice")
