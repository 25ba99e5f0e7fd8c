"""From several files to one: read, stacked in an order that no argument order changes, written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conceptzap import edit, format
from conceptzap.edit import Erasure, Header
from conceptzap.format import atomic, naming
from conceptzap.report import Report

MANY = 50  # files that take long enough to be counted


@dataclass(frozen=True)
class Stacked:
    """A stack that was written."""

    path: Path
    bytes: int
    digest: str
    header: Header


def write(
    paths: Sequence[Path | str], output: Path | str | None, force: bool, report: Report
) -> Stacked:
    """Read, stack and write; see `api.stack_files`."""
    if output is not None:  # the default name is known only once the files are read
        atomic.check_writable(naming.erasure_path((), output), force)
    counted = report.count(paths, len(paths), "reading") if len(paths) >= MANY else paths
    parts = [format.load(path) for path in counted]
    whole = format.seal(edit.stack(parts))
    target = naming.erasure_path((), output or naming.stack_path(whole.header.title))
    digest = format.save(whole, target, force)
    for text in _odd(parts, whole):
        report.warn(text)
    return Stacked(target, target.stat().st_size, digest, whole.header)


def _odd(parts: Sequence[Erasure], whole: Erasure) -> list[str]:
    """What is allowed in a stack and seldom meant."""
    erasing = {part.digest: part.header for part in parts if part.with_role("erase")}
    inside = {digest for head in erasing.values() for digest in head.parents}
    apart = [head.concepts for digest, head in erasing.items() if digest not in inside]
    counts = Counter(concept for concepts in apart for concept in set(concepts))
    counts |= Counter(whole.header.concepts)
    twice = sorted(concept for concept, count in counts.items() if count > 1)
    odd = [f"{concept!r} is erased more than once" for concept in twice]
    if not whole.with_role("erase"):
        odd.append("this stack holds keys only: it erases nothing")
    return odd
