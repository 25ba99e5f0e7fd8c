"""LoRA, as LECO, kohya's scripts, diffusers and PEFT write it: low-rank changes of layers.

Keys in any of their styles, by diffusers' paths or the original code's, in the UNet and the text encoders.
It acts on every prompt, as it does where it comes from. LECO says in its labels which concepts it erases,
the others say nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress

from conceptzap import imports
from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.imports import Found
from conceptzap.report import Report
from conceptzap.task import Task


def claims(found: Found) -> bool:
    return imports.is_lora(found) and not imports.names_prompts(found)


def concepts(found: Found) -> tuple[str, ...]:
    """What LECO's prompt settings, JSON objects joined by commas, say is erased."""
    with suppress(ValueError, AttributeError, KeyError, RecursionError):
        told = json.loads(f"[{found.labels.get('prompts', '')}]")
        erased = [one for one in told if one.get("action", "erase") == "erase"]
        return tuple(dict.fromkeys(str(one.get("positive") or one["target"]) for one in erased))
    return ()


def edits(found: Found, base: Base, task: Task, report: Report) -> list[Edit]:
    return imports.pairs(found, base)
