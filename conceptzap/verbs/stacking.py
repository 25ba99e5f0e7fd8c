"""From several files to one: read, stacked in an order that no argument order changes, written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap import edit, format
from conceptzap.edit import Erasure, Header
from conceptzap.errors import UsageError
from conceptzap.format import atomic, naming
from conceptzap.report import Report
from conceptzap.trust import admission
from conceptzap.verbs import elastic, overlaps
from conceptzap.verbs.overlaps import Overlaps

if TYPE_CHECKING:
    from conceptzap.base import Base
    from conceptzap.verbs.generating import AnyBase

MANY = 50  # files that take long enough to be counted


@dataclass(frozen=True)
class Stacked:
    """A stack that was written, and where its files touch one another."""

    path: Path
    bytes: int
    digest: str
    header: Header
    overlaps: Overlaps = field(default_factory=Overlaps)


def write(
    paths: Sequence[Path | str],
    output: Path | str | None,
    force: bool,
    report: Report,
    base: AnyBase | None = None,
    elastically: bool = False,
) -> Stacked:
    """Read, stack and write; see `api.stack_files`."""
    if elastically and base is None:
        raise UsageError("--elastic needs a base, whose text encoders its gates read", "name it with --base")
    if output is not None:  # the default name is known only once the files are read
        atomic.check_writable(naming.erasure_path((), output), force)
    counted = report.count(paths, len(paths), "reading") if len(paths) >= MANY else paths
    parts = [format.load(path) for path in counted]
    whole = format.seal(edit.stack(parts))
    target = naming.erasure_path((), output or naming.stack_path(whole.header.title))
    here = _ready(base, whole, report)
    if elastically and here is not None:
        from conceptzap.training import states

        with states.shared():
            parts = [elastic.gated(here, part, report) for part in parts]
        whole = format.seal(edit.stack(parts))
    names = {part.digest: str(naming.existing(path)) for part, path in zip(parts, paths, strict=True)}
    found = overlaps.find(parts, here, report, names)
    digest = format.save(whole, target, force)
    for text in found.lines():
        report.warn(text)
    if not whole.with_role("erase"):
        report.warn("this stack holds keys only: it erases nothing")
    return Stacked(target, target.stat().st_size, digest, whole.header, found)


def _ready(base: AnyBase | None, whole: Erasure, report: Report) -> Base | None:
    """The base that gates are asked by, of the architecture they are for; None where none was named."""
    if base is None:
        return None
    report.phase(f"loading {base if isinstance(base, (str, Path)) else 'the base'}")
    from conceptzap.verbs.generating import find_base

    here = find_base(base, "auto", "auto", None)
    admission.fits(here, whole, strict=False)
    return here
