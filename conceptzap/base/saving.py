"""Modules of a checkpoint as they are written again: with other weights, in another dtype."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from conceptzap.base import layout, loading
from conceptzap.base.identity import parameters
from conceptzap.edit import Json
from conceptzap.errors import RefusedError
from conceptzap.words import with_article

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def narrowest(tensors: Iterable[Tensor], among: Sequence[torch.dtype]) -> torch.dtype:
    """The first of `among` that holds all values as they are, else the last."""
    held = list(tensors)
    for dtype in among[:-1]:
        if all(tensor.to(dtype).to(tensor.dtype).equal(tensor) for tensor in held):
            return dtype
    return among[-1]


def twin(module: Any, asked: torch.dtype | None, changed: Mapping[str, Tensor], **config: Json) -> Any:
    """A diffusers module with some weights changed and these entries in its config.

    Weights that stay as they are are shared, not copied. diffusers keeps entries that begin with
    an underscore, and warns at every loading of others that it does not know.
    """
    dtype = asked or own_dtype(module)
    with init_empty_weights():
        found = type(module).from_config(module.config)
    weights = dict(parameters(module)) | changed
    own = {name: value.to(dtype) for name, value in weights.items()}
    missing = found.load_state_dict(own, strict=False, assign=True).missing_keys
    if missing and loading.without_encoder(found, missing):
        raise RefusedError(f"{with_article(type(module).__name__)} lacks {missing[0]}", layout.AGAIN)
    found.register_to_config(**config)
    return found.eval()


def own_dtype(module: nn.Module) -> torch.dtype:
    """What the checkpoint was stored in: the narrowest dtype that changes none of its weights."""
    return narrowest(module.parameters(), DTYPES)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)


def make_alike(folder: Path) -> None:
    """Text encoders load as fp32, like all else that diffusers loads when no dtype is asked for.

    They would load as they are stored, and a pipeline of mixed parts cannot draw.
    """
    for path in folder.glob("text_encoder*/config.json"):
        config = layout.read_json(path) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
