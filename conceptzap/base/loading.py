"""Find a checkpoint by name, load its parts, run none of its code, and check that they fit."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from conceptzap.base import hub, identity, layout, schedule, single_file
from conceptzap.base.layout import AGAIN, USABLE, reading
from conceptzap.errors import MismatchError, ResourceError, UsageError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"
PREDICTIONS = ("epsilon", "v_prediction")
SD2_WIDTH = 1024
LARGEST = 256  # side of latents
NAMED = 3  # how many of many keys a message shows
STORED = {"F16": torch.float16, "BF16": torch.bfloat16}
# what a VAE needs for reading pictures only
ENCODER = ("encoder.", "quant_conv.")


@dataclass(frozen=True)
class Parts:
    """A checkpoint, loaded and checked but for its numbers, on the CPU.

    `prints`: the fingerprint's parts, where the weights can no longer tell them.
    """

    unet: nn.Module
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]
    vae: nn.Module
    scheduler_config: dict[str, Any]
    prediction: str
    family: str
    id: str
    revision: str
    zero_negative: bool
    prints: dict[str, str] = field(default_factory=dict)


def read(name: str, dtype: torch.dtype, prediction: str | None = None) -> Parts:
    """The parts of the checkpoint called `name`; names and errors as in `opening.load_base`.

    Whether the weights are numbers is left to `check_finite`, where they are placed.
    """
    if prediction not in (None, *PREDICTIONS):
        raise UsageError(f"no --prediction {prediction!r}", f"use {' or '.join(PREDICTIONS)}")
    place, called, revision = _find(name)
    load = single_file.load if place.is_file() else _load_folder
    coarse = dtype == torch.bfloat16  # it rounds away what a fingerprint is taken of
    with quiet():
        found = load(place, None if coarse else dtype, prediction)
    _check(found, name)
    family = family_of(found["unet"].config, found["text_encoders"])
    parts = Parts(**found, family=family, id=called, revision=revision)
    if coarse:
        parts.prints.update(fingerprint(parts.unet, parts.text_encoders, parts.tokenizers))
        for module in (parts.unet, *parts.text_encoders, parts.vae):
            module.to(dtype)
    return parts


def fingerprint(
    unet: nn.Module, encoders: tuple[nn.Module, ...], tokenizers: tuple[Any, ...]
) -> dict[str, str]:
    """All parts of a fingerprint; see `Base.fingerprint`."""
    named = identity.parameters(unet), identity.text_parameters(encoders, tokenizers)
    return {part: identity.digest(identity.part(part, *named)) for part in ("attn2", "text", "unet")}


@cache
def demo_fingerprint() -> dict[str, str]:
    """`attn2` and `text` of the built-in checkpoint, {} where it is not there."""
    if not (DEMO_FOLDER / "model_index.json").is_file():
        return {}
    demo = read(DEMO, torch.float32)
    found = fingerprint(demo.unet, demo.text_encoders, demo.tokenizers)
    return {part: found[part] for part in ("attn2", "text")}


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


def _load_folder(folder: Path, dtype: torch.dtype | None, asked: str | None) -> dict[str, Any]:
    index = folder / "model_index.json"
    if not os.path.isfile(index):
        raise ResourceError(f"{folder} is no diffusers checkpoint: no model_index.json", USABLE)
    said_of_all = layout.read_json(index)
    parts = layout.check_index(said_of_all, str(folder))
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
    return found | {
        "prediction": single_file.settle_prediction(family, said, asked, str(folder)),
        "zero_negative": layout.zeros_negative(said_of_all, family),
    }


def _load_part(folder: Path, part: str, dtype: torch.dtype | None) -> Any:
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
            torch_dtype=dtype or _stored(folder / part, layout.WEIGHTS[part]),
            output_loading_info=True,
        )
    missing = report["missing_keys"]
    if part == "vae":
        missing = without_encoder(module, missing)
    if missing:
        raise MismatchError(f"{folder / part} lacks {_some(sorted(missing))}", AGAIN)
    return module


def _stored(place: Path, stem: str) -> torch.dtype:
    """What the weights of a component are stored in, by its first tensor."""
    with safe_open(min(place.glob(f"{stem}*.safetensors")), "pt") as file:
        return STORED.get(file.get_slice(min(file.keys())).get_dtype(), torch.float32)


def without_encoder(vae: Any, missing: Collection[str]) -> list[str]:
    """What a VAE lacks for decoding; where it lacks an encoder whole, it is left without one."""
    lacking = [name for name in missing if name.startswith(ENCODER)]
    whole = [name for name, _ in vae.named_parameters() if name.startswith(ENCODER)]
    if len(lacking) < len(whole):
        return list(missing)
    vae.encoder = vae.quant_conv = None
    return [name for name in missing if not name.startswith(ENCODER)]


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
    beside = unet.config.in_channels - found["vae"].config.latent_channels
    if beside not in layout.BESIDE:
        raise MismatchError(f"{name} takes {unet.config.in_channels} channels: upscaling?", USABLE)
    _check_size(unet.config.get("sample_size"), name)
    check_prediction(found["prediction"], name)
    for encoder, tokenizer in zip(encoders, found["tokenizers"], strict=True):
        _check_tokenizer(encoder.config, tokenizer, name)
    with reading(f"the scheduler of {name}"):
        schedule.scheduler(found["scheduler_config"], found["prediction"])
    for part in (unet, *encoders, found["vae"]):
        _check_there(part, name)


def _check_size(said: Any, name: str) -> None:
    """A side of the latents, height and width, or nothing said."""
    sides = said if isinstance(said, (list, tuple)) and len(said) == 2 else (said,)
    if said is not None and not all(type(side) is int and 1 <= side <= LARGEST for side in sides):
        largest = f"pictures of up to {8 * LARGEST} px"
        raise MismatchError(f"{name} does not draw {largest}: size {said!r}", USABLE)


def check_prediction(said: Any, name: str) -> None:
    if said not in PREDICTIONS:
        raise MismatchError(f"{name} predicts {said!r}, not noise or v", USABLE)


def _check_tokenizer(config: Any, tokenizer: Any, name: str) -> None:
    if len(tokenizer) > config.vocab_size:
        raise MismatchError(
            f"{name} does not fit together: {len(tokenizer)} tokens, {config.vocab_size} rows",
            "the tokenizer is another model's",
        )
    length = config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)


def _check_there(module: nn.Module, name: str) -> None:
    kind = type(module).__name__
    missing = [key for key, value in module.named_parameters() if value.is_meta]
    if kind == "AutoencoderKL":
        missing = without_encoder(module, missing)
    if missing:
        raise MismatchError(f"the {kind} of {name} lacks {_some(missing)}", AGAIN)


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `ResourceError` where a weight is NaN or infinite: one pass and one wait, where they are."""
    weights = dict(module.named_parameters())
    # a sum is finite if all numbers are, unless it overflows: then these are looked at one by one
    sums = torch.stack([value.sum(dtype=torch.float32) for value in weights.values()])
    doubted = [key for key, sound in zip(weights, sums.isfinite().tolist(), strict=True) if not sound]
    if broken := [key for key in doubted if not weights[key].isfinite().all()]:
        raise ResourceError(
            f"the {type(module).__name__} of {name} holds NaN or infinity in {_some(broken)}",
            f"{AGAIN}, or use --dtype float32",
        )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


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
