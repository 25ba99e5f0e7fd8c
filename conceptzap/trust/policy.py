"""`conceptzap.lock`: which erasures have to be in force on which base, pinned by digest. No torch.

A policy holds whole or not at all. Nothing weakens it: no strength, no key, no environment
variable. Whoever wants another policy writes another file, whose digest is then in every picture.
Under version control it also tells a substituted or older file from the right one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from conceptzap import format
from conceptzap.edit import BaseRef, Erasure
from conceptzap.errors import (
    FormatError,
    RefusedError,
    ResourceError,
    UsageError,
    escape,
)
from conceptzap.format import remote
from conceptzap.format.atomic import read_regular, write_atomic
from conceptzap.format.container import FILE_LIMIT
from conceptzap.trust import attested, lockfile
from conceptzap.trust.lockfile import PARTS, Pinned, Policy

if TYPE_CHECKING:
    from conceptzap.base import Base

LIMIT = 2**20
EVERYTHING = ("unet",)


def write(
    path: Path, base: BaseRef, base_name: str, files: Iterable[Path], force: bool = False,
    prediction: str | None = None, attacked: Iterable[Path] = (), limits: Mapping[str, float] | None = None,
) -> Policy:  # fmt: skip
    """Pin these erasures on this base, given by `Base.reference(EVERYTHING)`; all are required.

    `prediction` is what the base was said to predict, None where its own files say it. `attacked` are
    results of `conceptzap attack`, whose rates `limits` bounds.

    Files, and a base that is a folder or a file, are named from the lock's folder.

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
    results = _named(path, map(attested.located, attacked))
    shown = tuple(attested.attest(name, file, limits or {}) for name, file in sorted(results.items()))
    name = lockfile.name_base(Path(path), base_name)
    draft = Policy(Path(path), "", _range(), name, base, pins, prediction, shown)
    if reasons := _unattested(draft):
        raise _refused(f"cannot lock {escape(path)}", reasons)
    data = lockfile.encode(draft)
    policy = lockfile.parse(Path(path), data)
    write_atomic(path, data, force)
    return policy


def read(path: Path) -> Policy:
    """A policy, every field checked; raises `UsageError` for one that is missing or malformed."""
    try:
        data = read_regular(path, LIMIT)
    except FormatError as error:
        raise UsageError(str(error), error.hint) from error
    return lockfile.parse(Path(path), data)


def faults(policy: Policy) -> list[str]:
    """Every reason why this policy does not hold here, one line each; bases are `check_base`'s."""
    examined = (r for p in policy.files for r in _examine(policy, p))
    return [*_wrong_version(policy), *examined, *_unattested(policy)]


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
    if policy.prediction and base.prediction != policy.prediction:
        reasons.append(f"it was opened as predicting {base.prediction}, not {policy.prediction}")
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


def _unattested(policy: Policy) -> list[str]:
    """What the results of attacks do not show; they are of all files together that may be in force."""
    digests = {pinned.digest for pinned in policy.files}
    concepts = {concept for pinned in policy.files for concept in pinned.concepts}
    pairs = [(one, policy.locate(one)) for one in policy.attacks]
    return [r for one, place in pairs for r in attested.faults(one, place, policy.base, digests, concepts)]


def _examine(policy: Policy, pinned: Pinned) -> list[str]:
    try:
        if pinned not in _present(policy):
            return []
        data = read_regular(policy.locate(pinned), FILE_LIMIT)
        if hashlib.sha256(data).hexdigest() != pinned.sha256:
            return [f"{escape(pinned.path)} is not the file that was locked (sha256)"]
        return _unfit(policy.base, pinned, format.parse(data))
    except (FormatError, ResourceError) as error:
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


def _named(lock: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Path as the lock names it -> file; the same one twice counts once."""
    places = {
        Path(os.path.realpath(Path(file).parent)) / Path(file).name: Path(file) for file in files
    }
    return {_name(lock, place): file for place, file in places.items()}


def _name(lock: Path, place: Path) -> str:
    """What a lock calls a file: by its commit where the hub has it, else by the path from the lock."""
    if fetched := remote.origin(place):
        return str(fetched)
    return Path(os.path.relpath(place, lockfile.folder(Path(lock)))).as_posix()


def _pin(name: str, file: Path) -> tuple[Pinned, Erasure]:
    data = read_regular(file, FILE_LIMIT)
    try:
        erasure = format.parse(data)
    except FormatError as error:
        raise FormatError(f"{escape(file)}: {error}", error.hint) from error
    sha256 = hashlib.sha256(data).hexdigest()
    return Pinned(name, sha256, erasure.digest, erasure.header.concepts), erasure
