"""A pipeline folder that diffusers draws erased, gates and all: the base with the erasure as its UNet's file.

    import conceptzap.integrations.diffusers
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)

Its index names a UNet class of conceptzap's, which puts the erasure on as it loads. Where conceptzap is not
there, diffusers says so and loads nothing; the plain UNet lies where no loader looks by itself. No code is in
the folder. What needs the whole pipeline is refused: guides, edits of conditional rows alone, or of texts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from conceptzap import exports, format
from conceptzap.base import Base, layout, loading, saving
from conceptzap.base.modules import is_text
from conceptzap.edit import Erasure, Json, canonical_json
from conceptzap.errors import RefusedError
from conceptzap.exports import Order
from conceptzap.format import atomic
from conceptzap.report import Report
from conceptzap.runtime import guides
from conceptzap.runtime.attach import attached
from conceptzap.trust import canary

MODULE, CLASS = "conceptzap.integrations.diffusers", "ErasedUNet2DConditionModel"
PLAIN, FILE = "plain", "erasure.lprompt.safetensors"  # in the folder of the UNet
SCHEMA = "conceptzap.pipeline/1"


def use(target: Path) -> str:
    """How diffusers reads it."""
    return f"import {MODULE}; DiffusionPipeline.from_pretrained({str(target)!r})"


def check(order: Order) -> None:
    """Refuse what a UNet by itself cannot do: act on some rows alone, which it is not told, or on texts."""
    misfits = [e for e in order.edits if guides.conditional_only(e) or any(map(is_text, e.sites))]
    exports.refuse("pipeline folder", order, misfits)
    exports.check_whole("pipeline folder", order)
    exports.asked_dtype(order, saving.DTYPES)


def place(order: Order, output: Path) -> Path:
    return exports.place_folder(order, output)


@torch.no_grad()
def write(base: Base, order: Order, target: Path, report: Report) -> dict[str, Json]:
    """Write it, read both halves back, and give it its name only if together they draw what was asked."""
    asked = exports.asked_dtype(order, saving.DTYPES)
    unet, vae = (saving.twin(part, asked, {}, _name_or_path=base.id) for part in (base.unet, base.vae))
    encoders = tuple(saving.cast(part, asked or saving.own_dtype(part)) for part in base.text_encoders)
    made = replace(base, unet=unet, text_encoders=encoders, vae=vae)
    exports.check_space(made, target)
    erasure = format.seal(Erasure(order.header, order.edits))
    with atomic.hidden_folder(target) as folder:
        with exports.disk(target), loading.quiet():
            made.pipeline().save_pretrained(str(folder), safe_serialization=True)
            saving.make_alike(folder)
            _hand_over(folder, erasure)
            note = canonical_json({"schema": SCHEMA, **exports.origin(base, order)})
            (folder / exports.NOTE).write_text(note + "\n", encoding="utf-8")
        error = _verified(base, order, folder / "unet", unet.dtype)
        with exports.disk(target):
            if target.exists():
                exports.check_replaceable(target, order.force)
            atomic.put_folder(folder, target)
    return {"dtype": exports.name_of(unet.dtype), "relative_error": error}


def _hand_over(folder: Path, erasure: Erasure) -> None:
    """The UNet moves aside, the erasure takes its place, and the index names who puts them together."""
    unet = folder / "unet"
    (unet / PLAIN).mkdir()
    for path in [path for path in unet.iterdir() if path.is_file()]:
        shutil.move(path, unet / PLAIN / path.name)
    format.save(erasure, unet / FILE)
    index = layout.read_json(folder / "model_index.json") | {"unet": [MODULE, CLASS]}
    for path, value in ((folder / "model_index.json", index), (unet / "config.json", {"_class_name": CLASS})):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _verified(base: Base, order: Order, folder: Path, dtype: torch.dtype) -> float:
    """How far what was written is from the attached edits, as a share of what these change."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(str(folder / PLAIN), torch_dtype=base.dtype).eval()
    written, erasure = replace(base, unet=unet), format.load(folder / FILE)
    asked = [*order.header.concepts, ""]
    cond, latents = base.encode(asked), base.noise([canary.SEED] * len(asked))
    plain = base.eps(latents, canary.TIMESTEP, cond)
    with attached(base.unet, order.edits):
        wanted = base.eps(latents, canary.TIMESTEP, cond)
    with attached(unet, erasure.edits):
        found = written.eps(latents, canary.TIMESTEP, cond)
    error = ((found - wanted).norm() / (wanted - plain).norm()).item()
    if not error <= max(canary.TOLERANCE[dtype], canary.TOLERANCE[base.dtype]):
        name = exports.name_of(dtype)
        raise RefusedError(f"written in {name} it acts otherwise: {error:.2g} is off", "use --dtype float32")
    return float(f"{error:.3g}")
