"""The picture `erase` ends with: the same seeds before and after, for the concept and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure
from conceptzap.evaluation.closing import Drawn
from conceptzap.format import pictures
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.task import Task
from conceptzap.training import memory, wordings
from conceptzap.training.lessons import usual_keep

COLUMNS = 2  # prompts of the concept, and of the rest, where pictures are drawn for this alone
SIDE = 128  # pixels that a small checkpoint's pictures are enlarged to


def draw(
    base: Base, task: Task, edits: Sequence[Edit], seed: int, settings: Settings, report: Report
) -> tuple[list[Drawn], list[Drawn]]:
    """A few pictures of the concepts and of what stays, by the base and under the edits.

    As many at once as fit; seeds count up from `seed`.
    """
    concept, kept = concept_prompts(base, task), _kept(base, task)
    prompts = [*concept, *kept]
    seeds = range(seed, seed + len(prompts))
    rows = max(1, memory.rows_that_fit(base, 4 * COLUMNS) // 2)  # guidance doubles them
    looks = []
    for under, label in (((), "drawing with the base"), (edits, "drawing without the concept")):

        def work(chunk: slice, under: Sequence[Edit] = under) -> list[sampler.Drawing]:
            look = replace(settings, batch=chunk.stop - chunk.start)
            asked = prompts[chunk], seeds[chunk]
            return list(sampler.drawings(base, *asked, look, under, report))

        chunks = memory.in_chunks(len(prompts), rows, work)
        drawn = report.count((one for chunk in chunks for one in chunk), len(prompts), label)
        looks.append([one.picture.numpy() for one in drawn])
    found = [Drawn(*one) for one in zip(prompts, seeds, *looks, strict=True)]
    return found[: len(concept)], found[len(concept) :]


def sheet(
    base: Base, task: Task, erasure: Erasure, concept: Sequence[Drawn], kept: Sequence[Drawn]
) -> bytes:
    """PNG bytes of the pictures, prompts and seeds above them: the concept's first, then the rest."""
    blocks = []
    for name, drawn in (("concept", concept), ("others", kept)):
        captions = [f"{one.prompt}\nseed {one.seed}" for one in drawn]
        rows = [("before", [one.before for one in drawn]), ("after", [one.after for one in drawn])]
        blocks.append(pictures.Block(captions, [(f"{name}: {when}", row) for when, row in rows]))
    changes = (f"{concept} -> {anchor or 'nothing'}" for concept, anchor in task.pairs)
    title = ", ".join(changes)
    scale = max(1, SIDE // max(one.before.shape[1] for one in (*concept, *kept)))
    text = {"concepts": ", ".join(task.concepts), "digest": erasure.digest, "title": title}
    return pictures.encode_png(pictures.contact_sheet(title, blocks, scale), text)


def thumbnail(concept: Sequence[Drawn]) -> str:
    """The first picture of the concept, before and after, as the file carries it."""
    return pictures.thumbnail([concept[0].before, concept[0].after])


@torch.no_grad()
def sample(
    base: Base, task: Task, edits: Sequence[Edit], seed: int, settings: Settings
) -> np.ndarray:
    """A row of the concepts' pictures under edits that are being trained [h, w, 3] uint8."""
    prompts = concept_prompts(base, task)
    look = replace(settings, batch=min(len(prompts), memory.rows_that_fit(base, 2 * COLUMNS)))
    seeds = range(seed, seed + len(prompts))
    drawn = [one.picture.numpy() for one in sampler.drawings(base, prompts, seeds, look, edits)]
    captions = [f"{prompt}\nseed {number}" for prompt, number in zip(prompts, seeds, strict=True)]
    scale = max(1, SIDE // drawn[0].shape[1])
    return pictures.contact_sheet("", [pictures.Block(captions, [("", drawn)])], scale)


def telling_prompt(base: Base, task: Task) -> str:
    """The shortest prompt that asks for the first concept in something: "a cat by Van Gogh"."""
    concept, anchor, kind = task.triples[0]
    pairs = wordings.pairs(concept, anchor or "", kind, usual_things(base, task, kind))
    asked = [p.concept for p in pairs if not base.unknown_words(p.concept)]
    things = {word for thing in usual_things(base, task, kind) for word in thing.split()}
    shown = [prompt for prompt in asked if things & set(prompt.split())] if kind == "style" else asked
    return min(shown or asked or [concept], key=lambda prompt: len(prompt.split()))


def concept_prompts(base: Base, task: Task) -> list[str]:
    """Prompts of the concepts, taken in turn."""
    asked = []
    for concept, anchor, kind in task.triples:
        pairs = wordings.pairs(concept, anchor or "", kind, usual_things(base, task, kind))
        known = [pair.concept for pair in pairs if not base.unknown_words(pair.concept)]
        asked += _spread(known or [concept], -(-COLUMNS // len(task.pairs)))
    return asked[:COLUMNS]


def _kept(base: Base, task: Task, count: int = COLUMNS) -> list[str]:
    """Prompts of what stays, each word asked for as what it is: nothing is painted by a mushroom."""
    kinds, kept = set(task.kinds), []
    for kind in dict.fromkeys(task.kinds):
        foreign = set(usual_keep(kinds - {kind}))
        words = [word for word in task.keep if word not in foreign]
        kept += wordings.keep(words, kind, usual_things(base, task, kind))
    return _spread([prompt for prompt in kept if not base.unknown_words(prompt)], count)


def usual_things(base: Base, task: Task, kind: str) -> list[str]:
    gone = {concept.lower() for concept in task.concepts}
    things = wordings.wording(kind)["things"]
    return [word for word in things if word.lower() not in gone and not base.unknown_words(word)]


def _spread(items: Sequence[str], count: int) -> list[str]:
    """At most `count` items, evenly over all."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
