"""A LoRA file, as kohya's scripts, webui, ComfyUI, diffusers and PEFT read it: weights without gates.

Keys: `kohya`, diffusers' paths with underscores, which all but PEFT read; `original`, the original code's
paths likewise, which kohya's scripts take for SDXL; `diffusers`, as `save_lora_weights` writes; `peft`, a
folder with a config. `up, down` go in as they are, `into, down` as W into, down; the rest only by its
largest components.
All modules get one rank, filled up with zeros, and alpha = rank: readers disagree on ranks and
alphas that differ from module to module.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptzap import exports
from conceptzap.base import PREFIX, Base, find_module, names, saving
from conceptzap.base.modules import is_text
from conceptzap.edit import Edit, Json, canonical_json, raw
from conceptzap.errors import RefusedError, UsageError
from conceptzap.exports import Order
from conceptzap.format import ARCHITECTURES, atomic, container
from conceptzap.format.naming import SUFFIX
from conceptzap.report import Report
from conceptzap.runtime import ops

DTYPES = (torch.float16, torch.float32)
DENSE = frozenset({"delta", "keep", "bits"})
# elsewhere in a UNet or a text encoder no two readers agree on the names
NAMED = re.compile(
    r"unet\.((down|up)_blocks\.\d+|mid_block)\.(attentions|resnets)\.\d+\.[\w.]+"
    r"|text\.[12]\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
)
EXACT = 0.01  # largest relative error at one module of what is meant to be exact


class Factors(NamedTuple):
    """A change up down of one weight: up [out, r], down [r, in times kernel], on the CPU."""

    up: Tensor
    down: Tensor


KEYS = ("kohya", "original", "diffusers", "peft")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def use(target: Path) -> str:
    """How diffusers, or PEFT, reads it."""
    if target.is_dir():
        return f"peft.PeftModel.from_pretrained(pipe.unet, {str(target)!r})"
    return f"pipe.load_lora_weights({str(target)!r})"


def check(order: Order) -> None:
    """Refuse all but changes of weights, dense ones without a rank, and modules without a name."""
    exports.refuse("lora", order, [edit for edit in order.edits if not exports.is_plain(edit)])
    if order.keys not in (None, *KEYS):
        raise UsageError(f"--keys {order.keys!r} is unknown", f"use {', '.join(KEYS)}")
    if order.rank is not None and order.rank < 1:
        raise UsageError(f"--rank {order.rank} is out of range", "use 1 or more")
    if order.rank is None:
        whole = "--rank N keeps their N largest components; --to checkpoint keeps them whole"
        exports.refuse("lora", order, [edit for edit in order.edits if _is_dense(edit)], whole)
    nameless = [edit for edit in order.edits if not all(map(NAMED.fullmatch, edit.sites))]
    sites = sorted({site for edit in nameless for site in edit.sites if not NAMED.fullmatch(site)})
    differ = f"no two programs agree on a name for {', '.join(sites)}; use --to checkpoint"
    exports.refuse("lora", order, nameless, differ)
    if order.keys == "peft":
        beside = [edit for edit in order.edits if any(map(is_text, edit.sites))]
        exports.refuse("PEFT folder", order, beside, "it is of the UNet alone; use other --keys")
    exports.asked_dtype(order, DTYPES)


def place(order: Order, output: Path) -> Path:
    """`output` with the suffix .safetensors, but never the name of an erasure; for PEFT a folder."""
    if order.keys == "peft":
        return exports.place_folder(order, output)
    if output.is_dir() or not output.name:
        raise UsageError(f"--output {str(output)!r} is a folder", "name a file in it")
    if output.name.endswith(SUFFIX):
        raise UsageError(f"{output.name!r} is what an erasure is called", "leave .lprompt out")
    named = output.suffix == ".safetensors"
    target = output if named else output.with_name(f"{output.name}.safetensors")
    atomic.check_writable(target, order.force)
    return target


@torch.no_grad()
def write(base: Base, order: Order, target: Path, report: Report) -> dict[str, Json]:
    """Write the file once it is known that its factors give the change back."""
    edits = _by_site(order.edits)
    modules = {site: find_module(base, site) for site in edits}
    layers = {site: _factors(edits[site], modules[site], order.rank) for site in edits}
    parts = [part for layer in layers.values() for part in layer]
    dtype = exports.asked_dtype(order, DTYPES) or saving.narrowest(parts, DTYPES)
    rank = max(len(layer.down) for layer in layers.values())
    layers = {site: _padded(layer, rank, dtype) for site, layer in layers.items()}
    error = _error(edits, modules, layers, report)
    tensors = _tensors(base, modules, layers, order.keys or KEYS[0])
    entries, buffer = container.lay_out({name: raw(tensor) for name, tensor in tensors.items()})
    data = container.pack(_labels(base, order, rank), entries, buffer)
    if order.keys == "peft":
        _write_folder(base, order, target, data, {site: rank for site in layers})
    else:
        atomic.write_atomic(target, data, order.force)
    facts = {"dtype": exports.name_of(dtype), "rank": rank, "keys": order.keys or KEYS[0]}
    return {**facts, "relative_error": error}


def _write_folder(
    base: Base, order: Order, target: Path, data: bytes, ranks: Mapping[str, int]
) -> None:
    """A PEFT folder: the weights, and a config that names the layers; marked as written by export."""
    (rank,) = set(ranks.values())
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(site.removeprefix(PREFIX) for site in ranks),
        "base_model_name_or_path": base.id, "inference_mode": True,
    }  # fmt: skip
    note = exports.origin(base, order)
    with atomic.hidden_folder(target) as folder:
        (folder / WEIGHTS).write_bytes(data)
        for name, value in ((CONFIG, config), (exports.NOTE, note)):
            (folder / name).write_text(canonical_json(value) + "\n", encoding="utf-8")
        atomic.put_folder(folder, target)


def _is_dense(edit: Edit) -> bool:
    return bool(DENSE & edit.tensors.keys())


def _by_site(edits: Sequence[Edit]) -> dict[str, list[Edit]]:
    found: defaultdict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        for site in edit.sites:
            found[site].append(edit)
    return dict(sorted(found.items()))


def _factors(edits: Sequence[Edit], module: nn.Module, rank: int | None) -> Factors:
    """The change that all `edits` make at one module; ranks of exact ones add up."""
    parts = [_exact(edit, module) for edit in edits if not _is_dense(edit)]
    if dense := [edit for edit in edits if _is_dense(edit)]:
        parts.append(_largest(_change(dense, module), rank))
    ups, downs = zip(*parts, strict=True)
    return Factors(torch.cat(ups, 1).cpu(), torch.cat(downs).cpu())


def _exact(edit: Edit, module: nn.Module) -> Factors:
    weight = module.weight.detach().float()
    t = {slot: tensor.detach().to(weight) for slot, tensor in edit.tensors.items()}
    up = weight @ t["into"] if "into" in t else t["up"].flatten(1)
    return Factors(edit.scale * up, t["down"].flatten(1))


def _largest(change: Tensor, rank: int | None) -> Factors:
    """The `rank` largest components of a change, their sizes shared between both factors."""
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    root = sizes[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * v[:rank])


def _change(edits: Sequence[Edit], module: nn.Module) -> Tensor:
    """What `edits` add to the weight, [out, in times kernel]."""
    return ops.weight_delta(edits, module).flatten(1)


def _padded(layer: Factors, rank: int, dtype: torch.dtype) -> Factors:
    missing = rank - len(layer.down)
    up, down = F.pad(layer.up, (0, missing)), F.pad(layer.down, (0, 0, 0, missing))
    return Factors(up.to(dtype), down.to(dtype))


def _error(
    edits: Mapping[str, Sequence[Edit]],
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, Factors],
    report: Report,
) -> float:
    """Relative error of all changes as written, by Frobenius norm; where it is meant, a warning.

    Raises `RefusedError` for a module at which the change would be lost.
    """
    gaps, sizes, lossy = [], [], False
    for site, (up, down) in layers.items():
        wanted = _change(edits[site], modules[site]).cpu()
        gap, size = (up.float() @ down.float() - wanted).norm().item(), wanted.norm().item()
        dense = any(map(_is_dense, edits[site]))
        if not gap <= (size if dense else EXACT * size):
            name = exports.name_of(up.dtype)
            raise RefusedError(f"the change at {site} is lost in {name}", "use --dtype float32")
        gaps, sizes, lossy = [*gaps, gap], [*sizes, size], lossy or dense
    error = float(f"{math.hypot(*gaps) / math.hypot(*sizes):.3g}")
    if lossy:
        report.warn(f"the rank leaves a relative error of {error} of the change: it erases less")
    return error


def _tensors(
    base: Base, modules: Mapping[str, nn.Module], layers: Mapping[str, Factors], keys: str
) -> dict[str, Tensor]:
    """The file's tensors: a convolution's `down` has its kernel, its `up` one of 1 x 1."""
    tensors: dict[str, Tensor] = {}
    for site, (up, down) in layers.items():
        _, *shape = modules[site].weight.shape
        up, down = up.view(*up.shape, *(1 for _ in shape[1:])), down.view(len(down), *shape)
        if keys in ("diffusers", "peft"):
            start = "" if keys == "diffusers" else "base_model.model."
            name = start + (names.of_text(site) if is_text(site) else _unet_path(site, keys))
            tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        else:
            path = site if keys == "kohya" or is_text(site) else names.original_site(site, base.unet)
            name = names.underscored_text(site, base.family) if is_text(site) else names.underscored(path)
            tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
            tensors[f"{name}.alpha"] = torch.tensor(len(down), dtype=down.dtype)
    return tensors


def _unet_path(site: str, keys: str) -> str:
    return site if keys == "diffusers" else site.removeprefix(PREFIX)


def _labels(base: Base, order: Order, rank: int) -> dict[str, str]:
    """What programs show of the file and tell its kind by, and where it came from."""
    architecture, version, v2 = ARCHITECTURES[base.family]
    return {
        "conceptzap": canonical_json(exports.origin(base, order)),
        "format": "pt",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "conceptzap",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": order.header.title,
        "ss_base_model_version": version,
        "ss_network_alpha": str(rank),
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora",
        "ss_output_name": order.header.title,
        "ss_v2": v2,
    }
