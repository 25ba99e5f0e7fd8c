"""Small erasures made by hand, without torch, and files that are wrong in exactly one way."""

from __future__ import annotations

import copy
import hashlib
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conceptzap import format
from conceptzap.edit import (
    BaseRef,
    Edit,
    Erasure,
    Gate,
    Header,
    Raw,
    canonical_json,
    raw,
)
from conceptzap.errors import FormatError
from conceptzap.format import container, layout
from conceptzap.format import tree as header_tree

CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


def tensor(dtype: str, *shape: int, seed: int = 0) -> Raw:
    """Reproducible values in -1..1 (0 and 1 for BOOL)."""
    count, draw = 1, random.Random(f"{dtype}{shape}{seed}")
    for size in shape:
        count *= size
    if dtype == "BOOL":
        return Raw(dtype, shape, bytes(draw.randrange(2) for _ in range(count)))
    code = {"F32": "f", "F16": "e"}[dtype]
    values = (draw.uniform(-1, 1) for _ in range(count))
    return Raw(dtype, shape, struct.pack(f"<{count}{code}", *values))


def base(family: str = "sd1") -> BaseRef:
    return BaseRef(family, "demo", "1", "5" * 64, {"attn2": "a" * 64, "text": "b" * 64})


def header(**fields: Any) -> Header:
    plain = Header(title="Van Gogh", concepts=("Van Gogh",), anchors=("painting",), base=base())
    return replace(plain, **fields)


def small() -> Erasure:
    """One closed-form edit at one site: the smallest file worth damaging."""
    tensors = {"into": tensor("F16", 3, 1), "down": tensor("F16", 1, 3)}
    return Erasure(header(), (Edit("weight", (f"{CROSS}.to_k",), tensors),))


def match(seed: int = 0) -> Gate:
    tensors = {"query": tensor("F32", 2, 4, seed=seed), "mean": tensor("F32", 4, seed=seed)}
    return Gate("match", {"threshold": 0.25, "false_open": {"rate": 0.0, "n": 40}}, tensors)


def rich() -> Erasure:
    """Every op, gate and dtype there is in lprompt/1, with every header field filled."""
    gate, window = match(), Gate("window", {"low": 0, "high": 600})
    curve = Gate("curve", {}, {"times": tensor("F32", 3), "values": tensor("F32", 3, seed=1)})
    word = Gate("token", {"threshold": 0.5}, dict(match(1).tensors))
    prompt = {"prompt_k": tensor("F16", 5, 4), "prompt_v": tensor("F16", 5, 4, seed=1)}
    rows = {"tokens_k": tensor("F16", 2, 6), "tokens_v": tensor("F16", 2, 6, seed=1)}
    pair = {"into": tensor("F32", 4, 1), "down": tensor("F32", 1, 4)}
    conv = {"up": tensor("F16", 6, 1, 1, 1), "down": tensor("F16", 1, 6, 3, 3)}
    shapes = {"up": (6, 2), "down": (2, 6), "bias": (2,), "center": (6,)}
    adapter = {slot: tensor("F32", *shape) for slot, shape in shapes.items()}
    edits = (
        Edit("tokens", (CROSS,), prompt, gates=(gate,)),
        Edit("tokens", (f"{CROSS}.0", CROSS), rows, gates=(gate, window), scale=0.5, role="key"),
        Edit("weight", (f"{CROSS}.to_k", f"{CROSS}.to_v"), pair, gates=(word,)),
        Edit("weight", ("unet.conv_in",), conv, gates=(curve,)),
        Edit("weight", (f"{CROSS}.to_q",), {"delta": tensor("F16", 6, 6)}, role="attack"),
        Edit("weight", (f"{CROSS}.to_out.0",), {"keep": tensor("BOOL", 6, 6)}),
        Edit("adapter", (f"{CROSS}.norm",), adapter, {"phi": "topk", "k": 1, "reads": "y"}),
    )
    tested, other = sorted(edit.name for edit in edits[2:4]), edits[0].name
    sites = sorted(site for edit in edits[2:4] for site in edit.sites)
    change = {site: 0.25 * number for number, site in enumerate(sites, 1)}
    canary = {
        tested[0]: {"edits": tested, "prompt": "a church", "seed": 7, "change": change},
        other: {"edits": [other], "prompt": "", "seed": 2**62, "change": {"unet.elsewhere": 1e-9}},
    }
    return Erasure(
        header(
            title="Van Gogh + église 🏰",
            concepts=("Van Gogh", "église 🏰"),
            anchors=("painting", ""),
            made=({"method": "by hand", "config": {"steps": 3, "lr": 1e-3}, "seed": 2**62},),
            scores={"E": {"value": 1.0, "low": 0.9, "high": 1.0, "n": 36}},
            parents=("c" * 64, "d" * 64),
            canary=canary,
            extra={"note": {"kept": [None, True, 1, "x"]}},
        ),
        edits,
    )


def torch_like(erasure: Erasure) -> Erasure:
    """The same erasure with torch tensors, through a road that is not `format`'s own."""
    import numpy as np
    import torch

    kinds = {"F32": np.float32, "F16": np.float16, "BOOL": np.bool_}

    def turned(tensors: Any) -> dict[str, torch.Tensor]:
        return {
            slot: torch.from_numpy(np.frombuffer(t.data, kinds[t.dtype]).reshape(t.shape).copy())
            for slot, t in tensors.items()
        }

    def edit(one: Edit) -> Edit:
        gates = tuple(replace(gate, tensors=turned(gate.tensors)) for gate in one.gates)
        return replace(one, tensors=turned(one.tensors), gates=gates)

    return replace(erasure, edits=tuple(map(edit, erasure.edits)))


def parts(erasure: Erasure, number: int = layout.LAYOUT) -> tuple[dict[str, Any], dict[str, Raw]]:
    """The header tree, in a layout, and the tensors that a file of this erasure is made from."""
    edits = {edit.name: edit for edit in erasure.edits}
    gates = {gate.name: gate for edit in erasure.edits for gate in edit.gates}
    owners = (*edits.items(), *gates.items())
    tensors = {f"{n}.{slot}": raw(t) for n, owner in owners for slot, t in owner.tensors.items()}
    full = header_tree.write(erasure.header, edits, gates)
    return full if number == 1 else layout.compact(full), tensors


def signed(metadata: dict[str, str], entries: dict[str, Any], buffer: bytes) -> bytes:
    """A container whose digest is right, whatever else is wrong with it."""
    unsigned = {key: text for key, text in metadata.items() if key != "digest"}
    digest = hashlib.sha256(container.pack(unsigned, entries, buffer)).hexdigest()
    return container.pack({**unsigned, "digest": digest}, entries, buffer)


@cache
def whole(number: int) -> tuple[dict[str, Any], dict[str, Raw], dict[str, str]]:
    """The rich file in a layout: header tree, tensors, and what else it says."""
    metadata, _, _ = container.split(format.dumps(rich()))
    return *parts(rich(), number), metadata


def altered(
    change: Callable[[dict[str, Any], dict[str, Raw]], Any], number: int = layout.LAYOUT
) -> bytes:
    """The rich file in a layout after `change(tree, tensors)`, with the labels it had, signed anew."""
    tree, tensors, metadata = whole(number)
    tree, tensors = copy.deepcopy(tree), dict(tensors)
    change(tree, tensors)
    return signed({**metadata, "lprompt": canonical_json(tree)}, *container.lay_out(tensors))


@cache
def small_file() -> bytes:
    return format.dumps(small())


def relabelled(**entries: str | None) -> bytes:
    """The small file with other metadata entries (None: without it), signed anew."""
    metadata, tensors, buffer = container.split(small_file())
    merged = {**metadata, **entries}
    return signed({key: text for key, text in merged.items() if text is not None}, tensors, buffer)


def refused(path: Path, data: bytes) -> FormatError:
    """The one error that both readers raise for a file of these bytes."""
    path.write_bytes(data)
    errors = []
    for reader in (format.load, format.read_header):
        with pytest.raises(FormatError) as caught:
            reader(path)
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1]) and errors[0].exit_code == 3 and errors[0].hint
    shown = f"{errors[0]} {errors[0].hint}"
    assert shown.isprintable() and len(shown) < 600 and path.name in shown
    return errors[0]
