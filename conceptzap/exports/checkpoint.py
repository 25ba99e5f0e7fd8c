"""The whole base with the edits in its weights: weight edits without gates, as a folder or one file.

A folder is diffusers' own; a file, asked for by the suffix .safetensors, has the names of the
original Stable Diffusion code, which ComfyUI and others load. It is made beside its target under a
hidden name, read back, and renamed only when its UNet sees the noise that the attached edits see.
`conceptzap.json` and the UNet's config, or the file's metadata, say what went in.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from conceptzap import exports
from conceptzap.base import Base, load_base, loading, original, saving
from conceptzap.base.bpe import is_clips
from conceptzap.edit import Json, canonical_json
from conceptzap.errors import RefusedError
from conceptzap.exports import Order
from conceptzap.format import atomic
from conceptzap.format.naming import SUFFIX
from conceptzap.report import Report
from conceptzap.runtime import texts
from conceptzap.runtime.attach import attached, bake
from conceptzap.trust import canary

FILE = ".safetensors"
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
SCHEMA = "conceptzap.baked/1"


def use(target: Path) -> str:
    """How diffusers reads it."""
    way = "from_single_file" if target.suffix == FILE else "from_pretrained"
    kind = "StableDiffusionPipeline" if target.suffix == FILE else "DiffusionPipeline"
    return f"{kind}.{way}({str(target)!r})"


def check(order: Order) -> None:
    """Refuse what is no change of weights."""
    misfits = [edit for edit in order.edits if not exports.is_plain(edit)]
    exports.refuse("checkpoint", order, misfits)
    exports.check_whole("checkpoint", order)
    exports.asked_dtype(order, saving.DTYPES)


def place(order: Order, output: Path) -> Path:
    """`output` with links resolved; with `force` it may be a file, or a folder that an export wrote."""
    if output.suffix != FILE or output.name.endswith(SUFFIX):
        return exports.place_folder(order, output)
    target = Path(os.path.realpath(output))
    atomic.check_writable(target, order.force)
    return target


def write(base: Base, order: Order, target: Path, report: Report) -> dict[str, Json]:
    """Write it, read it back, and give it its name only if it erases like the edits."""
    asked = exports.asked_dtype(order, saving.DTYPES)
    made = _baked(base, order, asked)
    exports.check_space(made, target)
    note = canonical_json({"schema": SCHEMA, **exports.origin(base, order)})
    whole = target.suffix == FILE
    with atomic.hidden_folder(target) as folder:
        with exports.disk(target), loading.quiet():
            if whole:
                _write_file(made, folder / target.name, order.header.title, note)
            else:
                made.pipeline().save_pretrained(str(folder), safe_serialization=True)
                saving.make_alike(folder)
            (folder / exports.NOTE).write_text(note + "\n", encoding="utf-8")
        error = _verified(base, order, folder / target.name if whole else folder, made.unet.dtype)
        with exports.disk(target):
            if whole:
                atomic.check_writable(target, order.force)
                atomic.settle(folder)
                (folder / target.name).replace(target)
                atomic.sync(target.parent)
            else:
                if target.exists():
                    exports.check_replaceable(target, order.force)
                atomic.put_folder(folder, target)
    return {"dtype": exports.name_of(made.unet.dtype), "relative_error": error}


# -- the modules -------------------------------------------------------------------------------


def _baked(base: Base, order: Order, asked: torch.dtype | None) -> Base:
    """The base with the edits in its parts, each in the dtype asked for, or its own."""
    read, in_unet = texts.baked(base, order.edits)
    pairs = zip(base.text_encoders, read.text_encoders, strict=True)
    mark = {"erasures": [source["digest"] for source in order.sources]}
    unet, vae = base.unet, base.vae
    return replace(
        base,
        unet=saving.twin(unet, asked, bake(unet, in_unet), _name_or_path=base.id, _conceptzap=mark),
        text_encoders=tuple(saving.cast(new, asked or saving.own_dtype(old)) for old, new in pairs),
        vae=saving.twin(vae, asked, {}, _name_or_path=base.id),
    )


# -- one file ----------------------------------------------------------------------------------


def _write_file(made: Base, path: Path, title: str, note: str) -> None:
    """All weights under their original names. Raises `RefusedError` where the file would not be it."""
    if not all(map(is_clips, made.tokenizers)):
        raise RefusedError(
            f"{made.id} has words of its own, and one file holds no tokenizer",
            f"leave {FILE} out of --output, for a folder",
        )
    named = original.tensors(made.unet, made.vae, made.text_encoders, made.family)
    v = made.prediction == "v_prediction"
    architecture = ARCHITECTURES[made.family]
    if made.family == "sd2" and v:
        architecture = "stable-diffusion-v2-768-v"
    if made.family == "sdxl" and v:  # as fine-tunes say it: by empty tensors of these names
        named["v_pred"] = torch.zeros(0)
    if made.alphas[-1] == 0:
        named["ztsnr"] = torch.zeros(0)
    metadata = {
        "conceptzap": note,
        "format": "pt",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "conceptzap",
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": f"{made.id} without {title}",
    }
    save_file({name: value.contiguous() for name, value in named.items()}, path, metadata)


# -- the proof ---------------------------------------------------------------------------------


@torch.no_grad()
def _verified(base: Base, order: Order, path: Path, dtype: torch.dtype) -> float:
    """How far what was written is from the attached edits, as a share of what those change.

    Raises `RefusedError` when that is more than rounding, or when it would be drawn otherwise.
    """
    # a file says by itself what it predicts; of old folders only the user knows
    said = None if path.suffix == FILE else base.prediction
    written = load_base(str(path), str(base.device), exports.name_of(base.dtype), said)
    alike = written.alphas.equal(base.alphas) and written.latent_shape == base.latent_shape
    if not alike or written.prediction != base.prediction:
        raise RefusedError(
            f"one file cannot hold the size or the noise schedule of {base.id}",
            f"leave {FILE} out of --output, for a folder",
        )
    prompts = [*order.header.concepts, ""]
    plain, found = _eps(base, prompts), _eps(written, prompts)
    with attached(base, order.edits):
        wanted = _eps(base, prompts)
    error = ((found - wanted).norm() / (wanted - plain).norm()).item()
    if not error <= max(canary.TOLERANCE[dtype], canary.TOLERANCE[base.dtype]):
        raise RefusedError(
            f"as a checkpoint in {exports.name_of(dtype)} the erasure acts otherwise than attached:"
            f" {error:.2g} of its change is off",
            "use --dtype float32, or load the file with conceptzap",
        )
    return float(f"{error:.3g}")


def _eps(base: Base, prompts: list[str]) -> Tensor:
    latents = base.noise([canary.SEED] * len(prompts))
    return base.eps(latents, canary.TIMESTEP, base.encode(prompts)).float()
