"""Where the files of a stack touch one another, by their names and gates; nothing is drawn.

A concept that several files erase is found by name. Whether a gate of one file opens for a concept of
another is asked of a base's text encoders, all gates at once: a second for some hundred files on the demo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from conceptzap.edit import Edit, Erasure, Header, Json
from conceptzap.errors import escape
from conceptzap.report import Report
from conceptzap.training import wordings

if TYPE_CHECKING:
    from torch import Tensor

    from conceptzap.base import Base

CHUNK = 32  # prompts read together
TOLD = 10  # overlaps that are told one by one


@dataclass(frozen=True)
class Overlaps:
    """What files have in common.

    `concepts`: concept -> the files that erase it, where it is more than once. `gates`: title ->
    concepts of other files that one of its gates opens for; None where no base was asked. `everywhere`:
    titles of the files that act on every prompt, some of what they change being behind no gate that reads it.
    """

    concepts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gates: Mapping[str, tuple[str, ...]] | None = None
    everywhere: tuple[str, ...] = ()

    def record(self) -> dict[str, Json]:
        opened = None if self.gates is None else {t: list(names) for t, names in self.gates.items()}
        same = {concept: list(titles) for concept, titles in self.concepts.items()}
        return {"concepts": same, "gates": opened, "everywhere": list(self.everywhere)}

    def lines(self) -> list[str]:
        """The same for people, the first few of each kind one by one."""
        twice = self.concepts.items()
        same = [f"{concept!r} is erased more than once: by {listed(files)}" for concept, files in twice]
        opened = [
            f"the gate of {title!r} opens for {', '.join(map(repr, names))}, too"
            for title, names in (self.gates or {}).items()
        ]
        return [line for some in (same, opened) for line in _few(some)]


def listed(names: Sequence[str]) -> str:
    """Names of files, the first few of them."""
    more = len(names) - TOLD
    return ", ".join(map(escape, names[:TOLD])) + (f" and {more} more" if more > 0 else "")


def _few(some: Sequence[str]) -> list[str]:
    more = len(some) - TOLD
    return [*some[:TOLD], *([f"and {more} more like the last (--json has all)"] if more > 0 else [])]


def find(
    parts: Sequence[Erasure],
    base: Base | None = None,
    report: Report | None = None,
    names: Mapping[str, str] | None = None,
) -> Overlaps:
    """The overlaps of erasures, whatever their order; those of their gates where there is a `base`.

    `names`: digest -> name of the file, where there is one.
    """
    unique = {part.digest: part for part in parts if part.with_role("erase")}
    inside = {digest for part in unique.values() for digest in part.header.parents}
    apart = [unique[digest] for digest in sorted(unique.keys() - inside)]
    return Overlaps(
        repeated([part.header for part in apart], [(names or {}).get(part.digest, "") for part in apart]),
        None if base is None else _opened(base, apart, report or Report()),
        tuple(sorted(part.header.title for part in apart if not all(map(_by_text, _edits(part))))),
    )


def repeated(headers: Sequence[Header], names: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Concept -> files that erase it, where it is erased more than once, by their names or else titles."""
    titles: dict[str, list[str]] = {}
    spelled: dict[str, str] = {}
    for header, name in zip(headers, names or [""] * len(headers), strict=True):
        for concept in header.concepts:
            spelled[_key(concept)] = min(concept, spelled.get(_key(concept), concept))
            titles.setdefault(_key(concept), []).append(name or header.title)
    several = sorted((spelled[key], tuple(sorted(found))) for key, found in titles.items() if len(found) > 1)
    return dict(several)


def _key(concept: str) -> str:
    return wordings.bare(concept).casefold()


def _edits(part: Erasure) -> tuple[Edit, ...]:
    return part.with_role("erase")


def _by_text(edit: Edit) -> Edit | None:
    """The edit behind its text gates alone, at full strength; None where it has none."""
    from conceptzap.runtime.gates import TEXT

    gates = tuple(gate for gate in edit.gates if gate.kind in TEXT)
    return replace(edit, gates=gates, scale=1.0) if gates else None


def _opened(base: Base, parts: Sequence[Erasure], report: Report) -> dict[str, tuple[str, ...]]:
    """Title -> concepts of other files that its text gates open for."""
    names = {_key(concept): concept for part in parts for concept in sorted(part.header.concepts)}
    every = ((number, _by_text(edit)) for number, part in enumerate(parts) for edit in _edits(part))
    gated = [(number, edit) for number, edit in every if edit]
    if not gated:
        return {}
    levels = _levels(base, [edit for _, edit in gated], list(names.values()), report)  # [edits, concepts]
    found: dict[str, set[str]] = {}
    for (number, _), row in zip(gated, levels.gt(0).tolist(), strict=True):
        header = parts[number].header
        own = set(map(_key, header.concepts))
        for key, opens in zip(names, row, strict=True):
            if opens and key not in own:
                found.setdefault(header.title, set()).add(names[key])
    return {title: tuple(sorted(found[title])) for title in sorted(found)}


def _levels(base: Base, edits: Sequence[Edit], prompts: Sequence[str], report: Report) -> Tensor:
    """How far the edits' text gates open for prompts: [edits, prompts]."""
    import torch

    from conceptzap.runtime.gates import Panel

    panel = Panel(edits)
    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    with torch.no_grad():
        texts = (panel.text(base.encode(c).states) for c in report.count(chunks, len(chunks), "asking gates"))
        return torch.cat([panel.strengths(text, None).levels for text in texts], 1)
