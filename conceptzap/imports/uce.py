"""UCE: edited weights of all cross-attention keys and values, written whole by diffusers' names.

Gandikota et al. 2024, as `uce_sd_erase.py` writes it. All layers are multiplied by one matrix there,
W' = W + W into down, so one small pair gives the change of all of them back, where it does within `CLOSE`;
other edits of the same layers (ESD-x-strict) become a pair or a change each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from conceptzap import imports
from conceptzap.base import Base, parameters
from conceptzap.edit import Edit
from conceptzap.imports import CLOSE, LARGEST_RANK, Change, Found
from conceptzap.report import Report
from conceptzap.task import Task


def claims(found: Found) -> bool:
    return imports.are_keys_values(found)


def concepts(found: Found) -> tuple[str, ...]:
    return ()


def edits(found: Found, base: Base, task: Task, report: Report) -> list[Edit]:
    changed = list(imports.changes(found, base))
    return _shared(base, changed) or imports.edits_of(found, base, changed)


def _shared(base: Base, changed: Sequence[Change]) -> list[Edit]:
    """The one pair of all layers: into [width, r], down [r, width]; none where it is not exact."""
    weights = dict(parameters(base.unet))
    pairs = [(change, weights[change.name].detach().cpu().double()) for change in changed]
    if not pairs or len({change.value.shape[1] for change in changed}) > 1:
        return []
    # 1. the directions of text that any layer changes for, the largest first
    total = sum(change.value.double().T @ change.value.double() for change in changed)  # [width, width]
    sizes, v = torch.linalg.eigh(total)
    sizes, v = sizes.flip(0).clamp(min=0), v.flip(1)
    left = sizes.flip(0).cumsum(0).flip(0).sqrt()  # what the components from this one on make up
    rounding = sum(change.rounding**2 for change in changed) ** 0.5
    rank = int((left > max(CLOSE / 2 * left[0].item(), rounding)).sum())
    if not 0 < rank <= min(LARGEST_RANK, len(sizes) // 2):
        return []
    down = v[:, :rank].T  # [r, width]
    # 2. W into = dW down^T in all layers at once, by least squares
    gram = sum(weight.T @ weight for _, weight in pairs)
    asked = sum(weight.T @ change.value.double() @ down.T for change, weight in pairs)  # [width, r]
    into = torch.linalg.lstsq(gram, asked).solution
    # 3. only if every layer gets its own change back
    for change, weight in pairs:
        lost = (change.value - weight @ into @ down).norm().item()
        if lost > max(CLOSE * change.value.norm().item(), change.rounding):
            return []
    sites = tuple(sorted(f"unet.{change.name.removesuffix('.weight')}" for change in changed))
    factors = imports.balanced(into.float(), down.float())
    return [Edit("weight", sites, imports.stored({"into": factors.up, "down": factors.down}))]
