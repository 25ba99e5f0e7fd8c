"""The picture `erase` ends with: the same seeds before and after, for the concept and the rest."""

from __future__ import annotations

from collections.abc import Sequence

from conceptzap.base import Base
from conceptzap.edit import Erasure
from conceptzap.format import pictures
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.task import Task
from conceptzap.training import wordings

COLUMNS = 4
SIDE = 128  # pixels that a small checkpoint's pictures are enlarged to


def before_and_after(
    base: Base, task: Task, erasure: Erasure, seed: int, settings: Settings
) -> bytes:
    """PNG bytes of a labelled sheet: base and erased rows of concept prompts, then of kept ones."""
    rows = []
    for label, wanted in (("concept", _asked(base, task)), ("kept", _kept(base, task))):
        seeds = range(seed, seed + len(wanted))
        for when, edits in (("before", ()), ("after", erasure.edits)):
            drawn = sampler.drawings(base, wanted, seeds, settings, edits)
            rows.append((f"{label} {when}", [one.picture.numpy() for one in drawn]))
    sheet = pictures.side_by_side(rows, max(1, SIDE // max(base.size)))
    text = {"concepts": ", ".join(task.concepts), "digest": erasure.digest}
    return pictures.encode_png(sheet, text)


def _asked(base: Base, task: Task) -> list[str]:
    """Prompts of the concepts, taken in turn."""
    asked = []
    for concept, anchor, kind in task.triples:
        pairs = wordings.pairs(concept, anchor or "", kind, _things(base, task, kind))
        known = [pair.concept for pair in pairs if not base.unknown_words(pair.concept)]
        asked.append(_spread(known or [concept], -(-COLUMNS // len(task.pairs))))
    return [prompt for prompt in sum(asked, [])][:COLUMNS]


def _kept(base: Base, task: Task) -> list[str]:
    kinds = dict.fromkeys(task.kinds)
    kept = [p for kind in kinds for p in wordings.keep(task.keep, kind, _things(base, task, kind))]
    return _spread([prompt for prompt in kept if not base.unknown_words(prompt)], COLUMNS)


def _things(base: Base, task: Task, kind: str) -> list[str]:
    gone = {concept.lower() for concept in task.concepts}
    things = wordings.wording(kind)["things"]
    return [word for word in things if word.lower() not in gone and not base.unknown_words(word)]


def _spread(items: Sequence[str], count: int) -> list[str]:
    """At most `count` items, evenly over all."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
