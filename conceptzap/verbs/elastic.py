"""Elastic aggregation of a stack: each file acts as far as a prompt comes near its concepts.

Dong et al. 2024 (CIDM) weigh the low-rank changes of several concepts by the similarity of the prompt's
tokens to each concept's, to the power 4. Differs: the weights are not divided by their sum, which would
hand out all of it where a prompt speaks of none of the concepts and half of it where it speaks of two; they
begin at an absolute threshold. So a file by itself, gated once, is what a stack holds of it, in any order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from conceptzap import format
from conceptzap.edit import Edit, Erasure, Gate, sort_edits
from conceptzap.errors import RefusedError
from conceptzap.report import Report
from conceptzap.task import Task

if TYPE_CHECKING:
    from conceptzap.base import Base

POWER = 4.0
KEEP_PROMPTS = 400  # that a gate stays shut for


def gated(base: Base, erasure: Erasure, report: Report) -> Erasure:
    """The erasure with a gate on each edit that acts on every prompt; itself where there is none.

    The gate is fitted as its method would have, on what the file says it was made from. It loses its scores
    and its picture, and keeps the digest of what it was as its parent. Raises `RefusedError` for a change of
    the text encoder, which no gate that reads its states can hold back.
    """
    from conceptzap.runtime import texts
    from conceptzap.runtime.gates import CONTENT
    from conceptzap.verbs import erasing

    def always(edit: Edit) -> bool:
        return edit.role == "erase" and not any(gate.kind in CONTENT for gate in edit.gates)

    header = erasure.header
    if not any(map(always, erasure.edits)):
        return erasure
    if any(map(texts.of_text, erasure.edits)):
        message = f"{header.title!r} changes the text encoder, which acts before any gate can"
        raise RefusedError(message, "stack it without --elastic")
    task, seed = _task(erasure), int(header.made[0].get("seed", 0)) if header.made else 0
    near = _near(base, task, seed, report)
    edits = sort_edits(
        replace(edit, gates=(*edit.gates, near)) if always(edit) else edit for edit in erasure.edits
    )
    parents = header.parents or (erasure.digest,)
    tests = erasing.canaries(base, edits, task)
    head = replace(header, scores={}, thumbnail="", canary=tests, parents=parents)
    return format.seal(Erasure(head, edits))


def _task(erasure: Erasure) -> Task:
    """What the erasure was made for, as far as it says."""
    header = erasure.header
    keep = dict.fromkeys(word for made in header.made for word in made.get("keep", ()))
    kinds = [kind for made in header.made for kind in made.get("kinds", ())]
    told = tuple(kinds) if len(kinds) == len(header.concepts) and len(header.made) == 1 else ()
    return Task(header.concepts, header.anchors, tuple(keep), told)


def _near(base: Base, task: Task, seed: int, report: Report) -> Gate:
    from conceptzap.training import lessons

    taught = list(lessons.lessons(base, task, report))
    return lessons.near(base, taught, seed, KEEP_PROMPTS, power=POWER, report=report)
