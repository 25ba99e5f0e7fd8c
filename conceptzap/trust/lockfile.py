"""A policy as a file: TOML that people may read and put under version control. No torch."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from packaging.specifiers import SpecifierSet

from conceptzap.edit import BaseRef, Json
from conceptzap.errors import UsageError, escape
from conceptzap.format import remote
from conceptzap.format.tree import DIGEST
from conceptzap.trust import attested
from conceptzap.trust.attested import Attested

SCHEMA = "conceptzap.lock/1"
NAME = "conceptzap.lock"
# a policy pins every part of a fingerprint, also those that no edit touches
PARTS = ("attn2", "text", "unet")
TOP = {"schema": str, "conceptzap": str, "base": dict, "files": list}
BASE = {
    "name": str,
    "family": str,
    "id": str,
    "revision": str,
    "signature": str,
    "fingerprint": dict,
}
PREDICTION = "prediction"  # of the base, where its own files do not say it and `lock` was told
FILE = {"path": str, "sha256": str, "digest": str, "concepts": list, "required": bool}
ATTACKS = "attacks"  # results that are asked for, where there are any
ATTACK = {"path": str, "sha256": str, "attack": str, "limits": dict}
ANEW = "write it anew with: conceptzap lock"
HEAD = "# Written by `conceptzap lock`, checked by `conceptzap verify`.\n"
HERE = ("./", "../")  # how a base that is a folder or a file begins, from the policy's folder


@dataclass(frozen=True)
class Pinned:
    """One erasure file: `path` from the lock's folder or on the hub, sha256 of its bytes, digest, concepts.

    One that is not `required` may be absent; a file that is there has to be the right one.
    """

    path: str
    sha256: str
    digest: str
    concepts: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True)
class Policy:
    """A lock file as read. `digest` is the sha256 of its bytes, `base_name` what the lock calls its base,
    `prediction` what that was said to predict where its own files do not say it.

    `attacks`: results that have to lie where they say and stay under their limits.
    `versions` is a range such as ">=0.1.0,<0.2" (PEP 440).
    """

    path: Path
    digest: str
    versions: str
    base_name: str
    base: BaseRef
    files: tuple[Pinned, ...]
    prediction: str | None = None
    attacks: tuple[Attested, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the paths in it start."""
        return folder(self.path)

    def locate(self, pinned: Pinned | Attested) -> Path:
        """Where it lies here; what the hub has is fetched (`remote.fetch`: what it raises)."""
        return remote.fetch(pinned.path) if remote.is_name(pinned.path) else self.folder / pinned.path

    def locate_base(self) -> str:
        """The base as `load_base` takes it, from wherever that is called."""
        near = self.base_name.startswith(HERE)
        return os.path.normpath(self.folder / self.base_name) if near else self.base_name


def folder(lock: Path) -> Path:
    """The folder of a lock; resolved, because `..` behind a link leads elsewhere than its name says."""
    return Path(os.path.realpath(Path(lock).parent))


def name_base(lock: Path, base: str) -> str:
    """What a lock calls a base: a folder or a file by its path from there, all else as it is."""
    if base == "demo" or not os.path.exists(base):
        return base
    place = Path(os.path.realpath(Path(base).parent)) / Path(base).name
    path = Path(os.path.relpath(place, folder(lock))).as_posix()
    return path if path.startswith("../") else f"./{path}"


def encode(policy: Policy) -> bytes:
    """The bytes of a policy; what does not print is written by its code point."""
    base = {"name": policy.base_name, **policy.base.record()}
    if policy.prediction:
        base[PREDICTION] = policy.prediction
    files = [{**vars(pinned), "concepts": list(pinned.concepts)} for pinned in policy.files]
    tree = {"schema": SCHEMA, "conceptzap": policy.versions, "base": base, "files": files}
    if policy.attacks:
        tree[ATTACKS] = [one.record() for one in policy.attacks]
    try:
        return (HEAD + "".join(map(_printable, tomli_w.dumps(tree)))).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"cannot lock {escape(policy.path)}: a name is not UTF-8", "rename it"
        ) from error


def _printable(c: str) -> str:
    # outside of texts everything that TOML writes prints, so that an escape is read as one
    if c == "\n" or c.isprintable() or "\ud800" <= c <= "\udfff":
        return c
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


def parse(path: Path, data: bytes) -> Policy:
    """The policy that these bytes are, every field checked, else a `UsageError`."""
    try:
        tree = tomllib.loads(data.decode("utf-8"))
        _check_schema(tree.get("schema"))
        top = _fields(tree, TOP | ({ATTACKS: list} if ATTACKS in tree else {}), "it")
        _check_versions(top["conceptzap"])
        told = {PREDICTION: str} if PREDICTION in top["base"] else {}
        base = _fields(top["base"], BASE | told, "base")
        files = tuple(_file(table) for table in top["files"])
        attacks = tuple(_attack(table) for table in top.get(ATTACKS, ()))
        reference = _reference(base)
        _check_files(files)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{escape(path)} is no sound policy: {escape(error)}", ANEW) from error
    digest = hashlib.sha256(data).hexdigest()
    told = base.get(PREDICTION)
    return Policy(path, digest, top["conceptzap"], base["name"], reference, files, told, attacks)


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
    path, concepts = _near(fields["path"]), fields["concepts"]
    if not all(type(concept) is str for concept in concepts):
        raise ValueError(f"concepts of {path!r} are not texts")
    for name in ("sha256", "digest"):
        _check_digest(fields[name], f"{path}: {name}")
    return Pinned(**{**fields, "path": path, "concepts": tuple(concepts)})


def _attack(table: Json) -> Attested:
    fields = _fields(table, ATTACK, "an attack")
    _check_digest(fields["sha256"], f"{fields['path']}: sha256")
    return attested.parse({**fields, "path": _near(fields["path"])})


def _near(path: str) -> str:
    """A path from the policy's folder, in its shortest form, or a name on the hub."""
    if remote.is_name(path):
        return path
    if not path.strip("./") or os.path.isabs(path) or "\0" in path:
        raise ValueError(f"{path!r} is no path from the policy's folder to a file")
    return os.path.normpath(path)


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
