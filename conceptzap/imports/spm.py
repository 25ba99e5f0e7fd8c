"""SPM: rank-one adapters of every layer of the transformers, let through as a prompt comes near.

Lyu et al. 2024, as `train_spm.py` writes it: kohya's keys, and labels `prompts` (what is erased, joined by
commas), `rank`, `alpha`. Their program multiplies the factors by how near a prompt comes: the larger of the
states' cosine and the share of common tokens. Here a `similar` gate is fitted on the base instead: all of
it for the concepts, nothing for what must stay, a ramp between. For all prompts alike: `--format lora`.
"""

from __future__ import annotations

from dataclasses import replace

from conceptzap import imports
from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.imports import Found
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import lessons

concepts = imports.prompts


def claims(found: Found) -> bool:
    gated = any(key.startswith(imports.GATE) for key in found.tensors)
    return imports.is_lora(found) and imports.names_prompts(found) and not gated


def edits(found: Found, base: Base, task: Task, report: Report) -> list[Edit]:
    pairs = imports.pairs(found, base)
    near = lessons.near(base, list(lessons.lessons(base, task, report)), report.seed, report=report)
    return [replace(edit, gates=(near,)) for edit in pairs]
