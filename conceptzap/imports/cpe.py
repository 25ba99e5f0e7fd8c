"""CPE: residual attention gates at the keys and values of cross-attention.

Lee et al. 2025, as `train_cpe.py` writes it. One gate for all layers, w_qs [1, width, q] and a scaler
[1, width, 1], and in each layer lora_down [1, width, r], lora_up [1, r, out] and an alpha: what the
adapter's phi `attend` computes. (Their code projects the keys by w_qs, too, so w_ks says nothing.) Of a
prompt that comes near several concepts, theirs lets the nearest act alone; files stacked here add up.
"""

from __future__ import annotations

from collections import defaultdict

from conceptzap import imports
from conceptzap.base import Base, find_module, names
from conceptzap.base.modules import is_text
from conceptzap.edit import Edit
from conceptzap.errors import MismatchError, escape
from conceptzap.imports import ALPHA, Found
from conceptzap.report import Report
from conceptzap.task import Task

QUERY = f"{imports.GATE}encoder_layer.slf_attn.attention_module1.w_qs.weight"
UNUSED = f"{imports.GATE}encoder_layer.slf_attn.attention_module1.w_ks.weight"
SCALER = f"{imports.GATE}encoder_layer.slf_attn.gate.scaler.weight"
PARTS = (".lora_down.weight", ".lora_up.weight", ALPHA)

concepts = imports.prompts


def claims(found: Found) -> bool:
    return any(key.startswith(imports.GATE) for key in found.tensors)


def edits(found: Found, base: Base, task: Task, report: Report) -> list[Edit]:
    layers = _layers(found, base)
    count = len(found.tensors[QUERY])
    if count != 1:
        raise MismatchError(
            f"{escape(found.path)} holds {count} concepts, of which its own program lets the nearest act",
            "import the files that it was merged from, one by one",
        )
    query, scaler = found.tensors[QUERY].float()[0].T, found.tensors[SCALER].float()[0, :, 0]  # [q, w], [w]
    edits = []
    for site, keys in layers.items():
        down, up, alpha = (found.tensors[keys[part]].float() for part in PARTS)
        down, up = down[0].T, up[0].T  # [r, width], [out, r]
        factors = imports.balanced(float(alpha) / len(down) * up, down)
        if len(factors.down):
            tensors = {"query": query, "gate": scaler, "down": factors.down, "up": factors.up}
            edits.append(Edit("adapter", (site,), imports.stored(tensors), {"phi": "attend"}))
    return imports.changing(found, edits)


def _layers(found: Found, base: Base) -> dict[str, dict[str, str]]:
    """Site -> part -> key, once all keys are known and of the shapes that this base has."""
    known, layers = names.layers(base), defaultdict(dict)
    strange = []
    for key in found.tensors.keys() - {QUERY, UNUSED, SCALER}:
        part = next((end for end in PARTS if key.endswith(end)), "")
        site = known.get(key.removesuffix(part))
        if not part or site is None or part in layers[site]:
            strange.append(key)
        else:
            layers[site][part] = key
    if strange or QUERY not in found.tensors or SCALER not in found.tensors:
        imports.refuse(found, base, strange or [QUERY, SCALER], "have no place in, or are missing for,")
    width = base.unet.config.cross_attention_dim
    shapes = {key: tuple(tensor.shape) for key, tensor in found.tensors.items()}
    count = shapes[QUERY][:1]
    bad = [key for key, end in ((QUERY, shapes[QUERY][2:]), (SCALER, (1,)))
           if shapes[key] != (*count, width, *end) or len(shapes[key]) != 3]  # fmt: skip
    for site, keys in layers.items():
        down, up = (shapes.get(keys.get(part, ""), ()) for part in PARTS[:2])
        out, into = (0, 0) if is_text(site) else find_module(base.unet, site).weight.shape[:2]
        rank = down[2] if len(down) == 3 else 0
        fits = rank and down == (*count, into, rank) and up == (*count, rank, out)
        if not fits or ALPHA not in keys or found.tensors[keys[ALPHA]].numel() != 1:
            bad += keys.values()
    if bad:
        imports.refuse(found, base, bad, "have another shape than in")
    return dict(sorted(layers.items()))
