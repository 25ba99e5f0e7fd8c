"""Checkpoints in one .safetensors file, in the layout of the original Stable Diffusion code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from conceptzap.base.bpe import END, clip_tokenizer
from conceptzap.base.layout import (
    BESIDE,
    CONVERT,
    NO_CROSS_ATTENTION,
    NO_TEXT,
    PICKLES,
    USABLE,
    read_json,
    reading,
    zeros_negative,
)
from conceptzap.errors import MismatchError, ResourceError, UsageError

CONFIGS = Path(__file__).parent / "configs"
PADS = {"sd1": (END,), "sd2": ("!",), "sdxl": (END, "!")}
V_SIZE = 96  # side of the latents of Stable Diffusion 2 at 768 px, which is where it predicts v

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
# a tensor that only one family's text encoder has
TEXT = {
    "sdxl": "conditioner.embedders.1.model.token_embedding.weight",
    "sd2": "cond_stage_model.model.token_embedding.weight",
    "sd1": "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
}
# old merges of Stable Diffusion 1 leave out `text_model.`
OLD = re.compile(r"^cond_stage_model\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)")
NEW = "cond_stage_model.transformer.text_model."
REFINER = "conditioner.embedders.0.model.token_embedding.weight"
# parts of tensor names of SD3, FLUX and their like, in the original and in diffusers' layout
JOINT = ("joint_blocks.", "double_blocks.", ".add_k_proj.", "cap_embedder.")


@dataclass(frozen=True)
class Sketch:
    """What the header of a file says: family, prediction (None: not said), zero terminal SNR."""

    family: str
    prediction: str | None
    zero_snr: bool


def sketch(path: Path) -> Sketch:
    """What the header of a file says; `MismatchError` for all but a whole checkpoint."""
    if path.suffix.lower() in PICKLES:
        raise ResourceError(f"{path} is a pickle", CONVERT)
    # diffusers goes by the suffix, and takes all but this one for a pickle
    if path.suffix != ".safetensors":
        raise ResourceError(f"{path} is no .safetensors file", USABLE)
    with reading(str(path)), safe_open(path, "pt") as file:
        keys, said = {OLD.sub(NEW, key) for key in file.keys()}, file.metadata() or {}
        channels = file.get_slice(FIRST).get_shape()[1] if FIRST in keys else 0
    _check_keys(path, keys, said, channels)
    family = next((family for family, key in TEXT.items() if key in keys), None)
    if REFINER in keys:
        raise MismatchError(f"{path} has {NO_TEXT}", USABLE)
    if family is None or VAE not in keys:
        part = "text encoder" if family is None else "VAE"
        raise MismatchError(f"{path} has no {part}", "use a whole checkpoint, not the UNet alone")
    prediction = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(
        said.get("modelspec.prediction_type", "")
    )
    # empty marker tensors that SDXL fine-tunes trained on v carry
    prediction = prediction or ("v_prediction" if "v_pred" in keys else None)
    return Sketch(family, prediction, "ztsnr" in keys)


def _check_keys(path: Path, keys: set[str], said: dict[str, str], channels: int) -> None:
    if said.get("format", "").startswith("lprompt/"):
        raise MismatchError(f"{path} is an erasure, not a checkpoint", "give it as --with instead")
    if channels - 4 in BESIDE:
        return
    if channels:
        raise MismatchError(f"{path} takes {channels} channels: upscaling or alike", USABLE)
    if any(marker in key for key in keys for marker in JOINT):
        raise MismatchError(f"{path} has a transformer for a UNet: {NO_CROSS_ATTENTION}", USABLE)
    what = "a LoRA" if any("lora" in key for key in keys) else "no Stable Diffusion checkpoint"
    raise MismatchError(f"{path} is {what}: it has no {FIRST}", USABLE)


def settle_prediction(family: str, said: str | None, asked: str | None, name: str) -> str:
    """What the checkpoint predicts: as asked, else as it says, else noise.

    Raises `UsageError` for a Stable Diffusion 2 that says nothing: its two kinds share one shape.
    """
    if asked or said:
        return asked or said
    if family == "sd2":
        raise UsageError(
            f"{name} does not say whether it predicts noise or v",
            "give --prediction epsilon (512 px) or --prediction v_prediction (768 px)",
        )
    return "epsilon"


def load(path: Path, dtype: torch.dtype | None, asked: str | None) -> dict[str, Any]:
    """Modules, tokenizers and scheduler config of the file, built by the shipped configs.

    Weights that are stored in `dtype` (None: all) are views of the file on the disk, not copies.
    """
    found = sketch(path)
    prediction = settle_prediction(found.family, found.prediction, asked, str(path))
    config = CONFIGS / found.family
    with reading(str(path)):
        unet, vae, encoders = _assemble(path, found.family, dtype)
    if found.family == "sd2" and prediction == "v_prediction":
        unet.register_to_config(sample_size=V_SIZE)
    scheduler = read_json(config / "scheduler" / "scheduler_config.json")
    if found.zero_snr:  # such a model must be asked at the last timestep, too (Lin et al. 2023)
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {
        "unet": unet,
        "text_encoders": encoders,
        "tokenizers": tuple(clip_tokenizer(pad) for pad in PADS[found.family]),
        "vae": vae,
        "scheduler_config": scheduler,
        "prediction": prediction,
        "zero_negative": zeros_negative(read_json(config / "model_index.json"), found.family),
    }


def _assemble(
    path: Path, family: str, dtype: torch.dtype | None
) -> tuple[nn.Module, nn.Module, tuple[nn.Module, ...]]:
    """UNet, VAE and text encoders, by diffusers' own tables of names.

    Not by its pipelines: these read the file a second time, and fail on a missing tensor without
    naming it. What is missing stays on the meta device here, and the caller says what it is.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as layouts

    tensors = {OLD.sub(NEW, name): value for name, value in load_file(path).items()}
    config = CONFIGS / family
    unet = _hollow(UNet2DConditionModel, config / "unet", in_channels=tensors[FIRST].shape[1])
    vae = _hollow(AutoencoderKL, config / "vae")
    _fill(unet, layouts.convert_ldm_unet_checkpoint(tensors, unet.config), dtype)
    _fill(vae, layouts.convert_ldm_vae_checkpoint(tensors, vae.config), dtype)
    encoders = _text_encoders(config, family)
    for number, encoder in enumerate(encoders):
        if family == "sd2" or number:
            prefix = TEXT[family].removesuffix("token_embedding.weight")
            named = layouts.convert_open_clip_checkpoint(encoder, tensors, prefix)
        else:
            named = layouts.convert_ldm_clip_checkpoint(tensors)
        if not hasattr(encoder, "text_model"):  # so before transformers 5.6, and with a projection
            named = {name.removeprefix("text_model."): value for name, value in named.items()}
        _fill(encoder, named, dtype)
    return unet, vae, encoders


def _hollow(cls: Any, config: Path, **changes: Any) -> Any:
    """A diffusers module that has shapes only."""
    with init_empty_weights():
        return cls.from_config({**cls.load_config(str(config)), **changes})


def _text_encoders(config: Path, family: str) -> tuple[nn.Module, ...]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    from transformers.initialization import no_init_weights

    classes = (CLIPTextModel, CLIPTextModelWithProjection)[: len(PADS[family])]
    with init_empty_weights(), no_init_weights():
        return tuple(
            cls(CLIPTextConfig.from_pretrained(str(folder)))
            for cls, folder in zip(classes, sorted(config.glob("text_encoder*")), strict=True)
        )


def _fill(module: nn.Module, values: Mapping[str, Tensor | None], dtype: torch.dtype | None) -> None:
    own = {name: value.to(dtype) for name, value in values.items() if value is not None}
    module.load_state_dict(own, strict=False, assign=True)
