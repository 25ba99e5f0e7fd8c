"""Find a checkpoint by name, load its parts, run none of its code, and check that they fit."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conceptzap.base import hub, layout, single_file
from conceptzap.base.layout import AGAIN, USABLE, reading
from conceptzap.errors import MismatchError, ResourceError, UsageError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"
PREDICTIONS = ("epsilon", "v_prediction")
SD2_WIDTH = 1024
LARGEST = 256  # side of latents
NAMED = 3  # how many of many keys a message shows


@dataclass(frozen=True)
class Parts:
    """A checkpoint, loaded and checked, on the CPU."""

    unet: nn.Module
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]
    vae: nn.Module
    scheduler_config: dict[str, Any]
    prediction: str
    family: str
    id: str
    revision: str


def read(name: str, dtype: torch.dtype, prediction: str | None = None) -> Parts:
    """The parts of the checkpoint called `name`; names and errors as in `base.load_base`."""
    if prediction not in (None, *PREDICTIONS):
        raise UsageError(f"no --prediction {prediction!r}", f"use {' or '.join(PREDICTIONS)}")
    place, identity, revision = _find(name)
    load = single_file.load if place.is_file() else _load_folder
    with quiet():
        found = load(place, dtype, prediction)
    _check(found, name)
    family = family_of(found["unet"].config, found["text_encoders"])
    return Parts(**found, family=family, id=identity, revision=revision)


def _find(name: str) -> tuple[Path, str, str]:
    """Where the checkpoint lies, what it is called and which revision it is."""
    if name == DEMO:
        if not (DEMO_FOLDER / "model_index.json").is_file():
            raise ResourceError(f"no demo checkpoint in {DEMO_FOLDER}", "install conceptzap again")
        return DEMO_FOLDER, DEMO, ""
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path, path.resolve().name.removesuffix(".safetensors"), ""
    if hub.NAME.fullmatch(name) and not name.startswith(".") and path.suffix != ".safetensors":
        folder, commit = hub.fetch(name)
        return folder, name.partition("@")[0], commit
    raise ResourceError(f"there is no checkpoint {name!r}", _advice(path))


def _advice(path: Path) -> str:
    near: list[str] = []
    if os.path.isdir(path.parent):
        names = os.listdir(path.parent)
        near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "give demo, a hub id (owner/name), a diffusers folder or a .safetensors file"


def family_of(config: Any, encoders: tuple[nn.Module, ...]) -> str:
    """sd1, sd2 or sdxl: SDXL has two text encoders, 2.x wide text or linear projections."""
    if len(encoders) == 2:
        return "sdxl"
    wide = config.cross_attention_dim == SD2_WIDTH or config.use_linear_projection
    return "sd2" if wide else "sd1"


# -- folders -----------------------------------------------------------------------------------


def _load_folder(folder: Path, dtype: torch.dtype, asked: str | None) -> dict[str, Any]:
    index = folder / "model_index.json"
    if not os.path.isfile(index):
        raise ResourceError(f"{folder} is no diffusers checkpoint: no model_index.json", USABLE)
    parts = layout.check_index(layout.read_json(index), str(folder))
    loaded = {part: _load_part(folder, part, dtype) for part in parts}
    found = {
        "unet": loaded["unet"],
        "text_encoders": tuple(loaded[part] for part in parts if part.startswith("text")),
        "tokenizers": tuple(loaded[part] for part in parts if part.startswith("tokenizer")),
        "vae": loaded["vae"],
        "scheduler_config": layout.read_json(folder / "scheduler" / "scheduler_config.json"),
    }
    said = found["scheduler_config"].get("prediction_type")
    family = family_of(found["unet"].config, found["text_encoders"])
    return found | {"prediction": single_file.settle_prediction(family, said, asked, str(folder))}


def _load_part(folder: Path, part: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    where = {"subfolder": part, "local_files_only": True}
    if part.startswith("tokenizer"):
        layout.check_tokenizer(folder, part)
        with reading(str(folder / part)):
            return transformers.CLIPTokenizer.from_pretrained(str(folder), **where)
    variant = layout.check_component(folder, part)
    (name,) = layout.CLASSES[part]
    cls = getattr(diffusers, name, None) or getattr(transformers, name)
    with reading(str(folder / part)):
        module, report = cls.from_pretrained(
            str(folder),
            **where,
            variant=variant,
            use_safetensors=True,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise MismatchError(f"{folder / part} lacks {_some(missing)}", AGAIN)
    return module


# -- checks ------------------------------------------------------------------------------------


def _check(found: dict[str, Any], name: str) -> None:
    unet, encoders = found["unet"], found["text_encoders"]
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if unet.config.cross_attention_dim != width:
        raise MismatchError(
            f"{name} does not fit together: its text encoders give {width} numbers a token,"
            f" its UNet reads {unet.config.cross_attention_dim}",
            "the text encoder is another model's",
        )
    if unet.config.in_channels != found["vae"].config.latent_channels:
        raise MismatchError(
            f"{name} takes {unet.config.in_channels} channels: inpainting or upscaling", USABLE
        )
    side = unet.config.sample_size
    if type(side) is not int or not 1 <= side <= LARGEST:
        raise MismatchError(
            f"{name} does not draw square pictures of up to {8 * LARGEST} px: size {side!r}", USABLE
        )
    if found["prediction"] not in PREDICTIONS:
        raise MismatchError(f"{name} predicts {found['prediction']!r}, not noise or v", USABLE)
    for encoder, tokenizer in zip(encoders, found["tokenizers"], strict=True):
        _check_tokenizer(encoder.config, tokenizer, name)
    with reading(f"the scheduler of {name}"):
        ddim(found["scheduler_config"], found["prediction"])
    for part in (unet, *encoders, found["vae"]):
        _check_weights(part, name)


def _check_tokenizer(config: Any, tokenizer: Any, name: str) -> None:
    if len(tokenizer) > config.vocab_size:
        raise MismatchError(
            f"{name} does not fit together: {len(tokenizer)} tokens, {config.vocab_size} rows",
            "the tokenizer is another model's",
        )
    length = config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)


def _check_weights(module: nn.Module, name: str) -> None:
    kind = type(module).__name__
    if missing := [key for key, value in module.named_parameters() if value.is_meta]:
        raise MismatchError(f"the {kind} of {name} lacks {_some(missing)}", AGAIN)
    broken = [key for key, value in module.named_parameters() if not value.isfinite().all()]
    if broken:
        raise ResourceError(
            f"the {kind} of {name} holds NaN or infinity in {_some(broken)}",
            f"{AGAIN}, or use --dtype float32",
        )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def ddim(config: dict[str, Any], prediction: str) -> Any:
    """A DDIM scheduler with the noise schedule of another scheduler's config."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(config | {"prediction_type": prediction})


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own bars and warnings: stderr is for ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    names = ("diffusers", "transformers")
    levels = [logging.getLogger(name).level for name in names]
    libraries = (diffusers_logging, transformers_logging)
    libraries = [library for library in libraries if library.is_progress_bar_enabled()]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
        for library in libraries:
            library.enable_progress_bar()
