"""Text states of a task as plain matrices, and the directions in them that what is kept does not use.

For closed forms that treat the states of all text encoders as one: double precision, on the CPU. Of a list's
concepts only sums over them should be held on to, for the states of one may be hundreds of megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.training import closed_form, lessons
from conceptzap.training.closed_form import Moves
from conceptzap.training.lessons import Lesson
from conceptzap.training.solving import Solving


@dataclass(frozen=True)
class States:
    """Rows of text states: `source` [n, d] become `target` [n, d], `keep` [m, d] stay.

    `last` holds the rows of each concept's last token in its barest prompt, [concepts]. `pooled`: the same
    of whole prompts by their pooled texts, where the base reads these, too (SDXL).
    """

    source: Tensor
    target: Tensor
    keep: Tensor
    last: Tensor
    pooled: States | None = None

    @property
    def sums(self) -> Moves:
        return Moves.of(self.source, self.target, self.keep)


def states_of(
    base: Base, taught: Sequence[Lesson], keep_prompts: int, report: Report | None = None
) -> States:
    """The states of all lessons: from the concept on they move, those in front and the keep set's stay."""
    source, target, keep, last, pooled = [], [], [], [], []
    for lesson in taught:
        last.append(sum(map(len, source)) + base.token_count(lesson.concept) - 1)
        read = lessons.read(base, lesson, keep_prompts, report, gated=False)
        three = closed_form.aligned(base, read, lesson.pairs, lesson.names, lesson.anchor)
        for moved, wanted, front in three:
            source.append(moved)
            target.append(wanted)
            keep.append(front)
        stay = read.rows([*lesson.anchors, *lesson.kept(keep_prompts)])
        keep.append(read.hidden[stay].float().flatten(0, 1))
        if read.pooled is not None:
            pooled.append([read.pooled[rows] for rows in (*map(read.rows, _sides(lesson)), stay)])
    rows = (torch.cat(part).cpu().double() for part in (source, target, keep))
    return States(*rows, torch.tensor(last), _joined(pooled))


def pooled_of(base: Base, taught: Sequence[Lesson], keep_prompts: int) -> States | None:
    """The pooled texts alone; None on a base that reads none."""
    return states_of(base, taught, keep_prompts).pooled if base.family == "sdxl" else None


def _sides(lesson: Lesson) -> tuple[list[str], list[str]]:
    return lesson.prompts, lesson.anchors


def _joined(parts: Sequence[Sequence[Tensor]]) -> States | None:
    """Lessons' pooled texts as one: [n, p], [n, p] and [m, p]; a concept's barest prompt is its first."""
    if not parts:
        return None
    counts = [len(source) for source, _, _ in parts]
    rows = (torch.cat(part).cpu().double() for part in zip(*parts, strict=True))
    return States(*rows, torch.tensor([sum(counts[:i]) for i in range(len(counts))]))


def null_space(kept: Tensor, threshold: float) -> Solving[Tensor]:
    """Orthonormal directions [d, k] with at most `threshold` of the mean energy of `kept`, sum p p^T [d, d].

    The weakest direction always counts, for there must be one to erase in.
    """
    values, vectors = yield torch.linalg.eigh, kept
    weak = values <= max(threshold * values.mean().item(), values[0].item())
    return vectors[:, weak]


def cut(change: Tensor, gram: Tensor, rank: int) -> Solving[dict[str, Tensor]]:
    """`into` [d, r] and `down` [r, d] of the rank-r change that is nearest to `change` on some states.

    `gram` is their sum c c^T [d, d]. B_r = U U^T B with U the strongest left singular vectors of B C:
    whatever B does not see, B_r does not see either.
    """
    _, vectors = yield torch.linalg.eigh, change @ gram @ change.T
    into = vectors[:, -rank:]
    return {"into": into.float().contiguous(), "down": (into.T @ change).float().contiguous()}


def outputs(base: Base, edits: Iterable[Edit], site: str) -> Tensor:
    """Orthonormal directions [out, r] that the low-rank edits at a layer add to its output; r may be 0.

    Strongest first, at most half of the layer's outputs, so that as many are left for something new.
    """
    weight = base.module(site).weight.detach().cpu().double()
    here = [edit for edit in edits if edit.op == "weight" and site in edit.sites and "down" in edit.tensors]
    changes = [_product(edit, weight) for edit in here]  # [out, in ...]
    if not changes:
        return weight.new_zeros(len(weight), 0)
    u, s, _ = torch.linalg.svd(torch.cat(changes, 1), full_matrices=False)
    rank = int((s > 1e-6 * s[0].clamp_min(1e-300)).sum())
    return u[:, : min(rank, len(weight) // 2)]


def _product(edit: Edit, weight: Tensor) -> Tensor:
    """The change that a low-rank edit makes of a layer's weight, [out, in times kernel]."""
    t = {slot: tensor.detach().cpu().double() for slot, tensor in edit.tensors.items()}
    up = weight @ t["into"] if "into" in t else t["up"].flatten(1)
    return edit.scale * up @ t["down"].flatten(1)
