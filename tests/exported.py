"""Exports put on plain diffusers, and how near that comes to the attached edits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import edits as some
import torch
from diffusers import (
    DiffusionPipeline,
)

from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.exports import lora
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.runtime.attach import edits_on
from conceptzap.testing import tiny

SUFFIX = ".lprompt.safetensors"
FORMATS = [name for name in family.members("exports") if name != "diffusers"]  # all but the one with gates
PROMPTS = [*some.ASKED, *some.OTHER]
CLOSE = 1e-5


class Heard(Report):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def named(base: Base) -> list[str]:
    """Every Linear and convolution of the UNet that a LoRA has a name for."""
    modules = base.unet.named_modules()
    paths = [f"unet.{name}" for name, m in modules if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    return [path for path in paths if lora.NAMED.fullmatch(path)]


def save(folder: Path, base: Base, name: str, edits: Sequence[Edit]) -> Path:
    path = folder / f"{name}{SUFFIX}"
    format.save(some.erasure(base, edits), path)
    return path


def through_diffusers(base: Base, written: Path) -> Base:
    """A base of the same weights, or of none, on which diffusers alone puts what was written."""
    if written.is_dir():
        importlib.import_module("conceptzap.integrations.diffusers")  # what one with gates asks for
        # whole folders are drawn with in `test_export_checkpoint` and `test_export_diffusers`
        words = {f"tokenizer{'_2' * n}": tokenizer for n, tokenizer in enumerate(base.tokenizers)}
        pipe = DiffusionPipeline.from_pretrained(str(written), vae=base.vae, **words)
    else:
        pipe = tiny(base.family).pipeline()
        pipe.load_lora_weights(str(written))
    encoders = (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
    return replace(base, unet=pipe.unet.eval(), text_encoders=tuple(one.eval() for one in encoders if one))


@cache
def untouched(base: Base) -> torch.Tensor:
    """The noise that a base itself sees, once for all exports of it."""
    return seen(base)


def seen(base: Base, edits: Sequence[Edit] = ()) -> torch.Tensor:
    """The noise under the edits, or under those that a pipeline was loaded with."""
    if edits_on(base.unet) is not None:
        with torch.no_grad():
            return base.eps(base.noise(range(len(PROMPTS))), some.TIME, base.encode(PROMPTS))
    return some.eps(base, PROMPTS, edits)


SEEN: dict[tuple[Base, tuple[str, ...]], torch.Tensor] = {}


def under(base: Base, edits: Sequence[Edit]) -> torch.Tensor:
    """The noise under attached edits, once for all formats that they go out in."""
    key = base, tuple(edit.name for edit in edits)
    if key not in SEEN:
        SEEN[key] = seen(base, edits)
    return SEEN[key]


def is_exported(base: Base, written: Path, edits: Sequence[Edit], within: float = CLOSE) -> None:
    """Plain diffusers sees the noise of the attached edits, which is far from the base's."""
    wanted = under(base, edits)
    assert some.far(seen(through_diffusers(base, written)), wanted) < within
    assert some.far(untouched(base), wanted) > 30 * within


def bytes_of(path: Path) -> dict[str, bytes]:
    """Every file of an export, a folder or one file, by its name."""
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return {str(one.relative_to(path)): one.read_bytes() for one in files}
