"""Who a checkpoint is: its parameters by their plain names, and digests of names, shapes, weights.

What others put on top of a checkpoint is no part of it: the names that LoRA and torch.compile add,
rows that textual inversion appends to the embedding table, and the copies that fused projections
leave behind when they are taken apart again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.errors import ResourceError

Named = list[tuple[str, Tensor]]

# what wrappers (LoRA, torch.compile) and library versions put into a parameter's name
_WRAPPING = re.compile(r"(^|\.)(_orig_mod|base_layer)(?=\.)|^text_model\.")
_FUSED = re.compile(r"\.to_(qkv|kv)\.")
_TABLE = "embeddings.token_embedding.weight"  # [tokens, width]


def parameters(module: nn.Module) -> Named:
    """Parameters by name, sorted, called as in the plain checkpoint; a LoRA's are left out.

    Weights that accelerate keeps elsewhere until their layer runs are fetched from there.
    """
    processors = (getattr(part, "processor", None) for part in module.modules())
    fused = any(type(one).__name__.startswith("Fused") for one in processors)
    own = (
        (name, _fetched(module, name, value))
        for name, value in module.named_parameters()
        if "lora_" not in name and (fused or not _FUSED.search(name))
    )
    named = ((_WRAPPING.sub("", name).lstrip("."), value) for name, value in own)
    return sorted(named, key=lambda pair: pair[0])


def _fetched(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """The weight itself where sequential offloading has left its shape only."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1) if value.is_meta else ():
        hook = getattr(module.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights = getattr(one, "weights_map", None)
            try:
                return weights[".".join(parts[depth:])]
            except (KeyError, TypeError):  # not kept by this hook, or no weights at all
                pass
    return value


def text_parameters(encoders: Sequence[nn.Module], tokenizers: Sequence[Any]) -> Named:
    """Parameters of all text encoders, `text_encoder_1.` first, with no added tokens' rows."""
    return [
        (f"text_encoder_{n}.{name}", value[: tokenizer.vocab_size] if name.endswith(_TABLE) else value)
        for n, (encoder, tokenizer) in enumerate(zip(encoders, tokenizers, strict=True), 1)
        for name, value in parameters(encoder)
    ]


def signature(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the sorted names and shapes."""
    lines = (f"{name} {list(value.shape)}\n" for name, value in named)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def part(name: str, unet: Named, text: Named) -> Named:
    """The parameters that a fingerprint's part covers: `attn2`, `text`, or `unet` whole."""
    if name == "text":
        return text
    return [(n, value) for n, value in unet if name == "unet" or ".attn2." in n]


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and fp16-rounded weights, so that fp16 and fp32 copies agree."""
    result = hashlib.sha256()
    for name, value in named:
        if value.is_meta:
            raise ResourceError(f"{name} is offloaded, so it cannot be read", "do this before that")
        result.update(f"{name} {list(value.shape)}\n".encode())
        result.update(value.detach().to("cpu", torch.float16).contiguous().numpy().data)
    return result.hexdigest()
