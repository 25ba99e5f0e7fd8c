"""Exports: erasures and target are checked first, then the base; only then is anything written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap import edit
from conceptzap.edit import Json, sort_edits
from conceptzap.errors import ConceptZapError, RefusedError, UsageError
from conceptzap.exports import SHIP, Order
from conceptzap.format import naming
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.trust import admission
from conceptzap.trust.admission import Asked, Loaded
from conceptzap.verbs.generating import find_base

if TYPE_CHECKING:
    from conceptzap.verbs.generating import AnyBase

FAMILY = "exports"


@dataclass(frozen=True)
class Exported:
    """What was written where. `use`: how others read it; `facts`: what the exporter says of it."""

    path: Path
    to: str
    bytes: int
    erasures: tuple[Mapping[str, Json], ...]
    use: str
    facts: Mapping[str, Json]

    def record(self) -> dict[str, Json]:
        """All but the path as JSON, what the exporter says beside the rest."""
        erasures = [dict(one) for one in self.erasures]
        return {"to": self.to, "bytes": self.bytes, "erasures": erasures, **self.facts}


def export(
    erasures: Asked | Iterable[Asked],
    to: str,
    output: Path | str,
    *,
    base: AnyBase,
    prediction: str | None,
    rank: int | None,
    keys: str | None,
    dtype: str,
    force: bool,
    report: Report,
) -> Exported:
    """Check, admit and write; see `api.export`."""
    family.require(FAMILY, to)
    loaded = admission.load_all(erasures)
    order = _order(loaded, rank, keys, dtype, force)
    exporter = family.load(FAMILY, to)
    try:
        exporter.check(order)
    except RefusedError as error:
        raise _pointed(error, order, to) from None
    target = exporter.place(order, naming.place(output))
    # on the CPU, for what is written must not depend on the machine
    here = find_base(base, "cpu", "float32", prediction)
    admission.admit_all(here, [one.erasure for one in loaded], False, report)
    facts = exporter.write(here, order, target, report)
    return Exported(target, to, _size(target), order.sources, exporter.use(target), facts)


def _pointed(error: RefusedError, order: Order, to: str) -> RefusedError:
    """The same, with the formats that would hold all of it in its hint."""
    if error.hint != SHIP:
        return error
    plain = replace(order, rank=None, keys=None, dtype="auto")
    able = [name for name in family.members(FAMILY) if name != to and _holds(name, plain)]
    if not able:
        return error
    return RefusedError(str(error), f"--to {' or --to '.join(able)} holds it whole; or {SHIP}")


def _holds(name: str, order: Order) -> bool:
    try:
        family.load(FAMILY, name).check(order)
    except ConceptZapError:
        return False
    return True


def _order(
    loaded: Sequence[Loaded], rank: int | None, keys: str | None, dtype: str, force: bool
) -> Order:
    """What all erasures do together. Raises for what is never exported: keys, attacks, nothing."""
    for one in loaded:
        if other := {edit.role for edit in one.edits} - {"erase"}:
            what = f"{one.erasure.header.title!r} holds edits of the role {min(other)}"
            raise RefusedError(f"{what}, which do not erase", "export the erasure they belong to")
        if not one.strength:
            title = one.erasure.header.title
            raise UsageError(f"{title!r} at strength 0 is absent", "leave it out")
    header = edit.stack(one.erasure for one in loaded).header
    return Order(
        header,
        sort_edits(edit for one in loaded for edit in one.edits),
        tuple(sorted((_source(one) for one in loaded), key=lambda source: source["digest"])),
        rank,
        dtype,
        force,
        keys,
    )


def _source(one: Loaded) -> dict[str, Json]:
    return {
        "title": one.erasure.header.title,
        "digest": one.erasure.digest,
        "strength": one.strength,
    }


def _size(target: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    found = target.rglob("*") if target.is_dir() else [target]
    return sum(path.stat().st_size for path in found if path.is_file())
