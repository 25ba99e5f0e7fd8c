"""ESD: trained weights of the UNet, written whole: cross-attention (ESD-x) or any other layers.

Gandikota et al. 2023, as `esd_sd.py` writes it: weights and biases by diffusers' names; whole UNets by the
original code's names, too, once they are .safetensors. What the file leaves as it is takes no room. A change
is kept as a pair of factors where that is exact, else whole, in half precision.
"""

from __future__ import annotations

from conceptzap import imports
from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.imports import Found
from conceptzap.report import Report
from conceptzap.task import Task


def claims(found: Found) -> bool:
    return imports.is_weights(found) and not imports.are_keys_values(found)


def concepts(found: Found) -> tuple[str, ...]:
    return ()


def edits(found: Found, base: Base, task: Task, report: Report) -> list[Edit]:
    return imports.edits_of(found, base, imports.changes(found, base))
