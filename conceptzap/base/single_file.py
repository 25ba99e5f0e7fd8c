"""Checkpoints in one .safetensors file, in the layout of the original Stable Diffusion code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from conceptzap.base.bpe import END, clip_tokenizer
from conceptzap.base.layout import (
    CONVERT,
    NO_CROSS_ATTENTION,
    PICKLES,
    USABLE,
    read_json,
    reading,
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
        keys, said = set(file.keys()), file.metadata() or {}
        channels = file.get_slice(FIRST).get_shape()[1] if FIRST in keys else 0
    _check_keys(path, keys, said, channels)
    family = next((family for family, key in TEXT.items() if key in keys), None)
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
    if channels == 4:
        return
    if channels:
        raise MismatchError(f"{path} takes {channels} channels: inpainting or alike", USABLE)
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


def load(path: Path, dtype: torch.dtype, asked: str | None) -> dict[str, Any]:
    """Modules, tokenizers and scheduler config of the file, built by the shipped configs."""
    found = sketch(path)
    prediction = settle_prediction(found.family, found.prediction, asked, str(path))
    config = CONFIGS / found.family
    tokenizers = tuple(clip_tokenizer(pad) for pad in PADS[found.family])
    with reading(str(path)):
        pipe = _assemble(path, found.family, tokenizers, dtype)
    if found.family == "sd2" and prediction == "v_prediction":
        pipe.unet.register_to_config(sample_size=V_SIZE)
    scheduler = read_json(config / "scheduler" / "scheduler_config.json")
    second = (pipe.text_encoder_2,) if found.family == "sdxl" else ()
    return {
        "unet": pipe.unet,
        "text_encoders": (pipe.text_encoder, *second),
        "tokenizers": tokenizers,
        "vae": pipe.vae,
        "scheduler_config": scheduler | {"rescale_betas_zero_snr": found.zero_snr},
        "prediction": prediction,
    }


def _assemble(path: Path, family: str, tokenizers: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """diffusers' own assembly of the file, with the UNet and the VAE handed in.

    Handed in because diffusers fails on a missing tensor of these two without naming it; what is
    missing stays on the meta device here, and the caller says what it is.
    """
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers.loaders import single_file_utils as layouts

    tensors = load_file(path)
    config = CONFIGS / family
    kinds = {
        "unet": (UNet2DConditionModel, layouts.convert_ldm_unet_checkpoint),
        "vae": (AutoencoderKL, layouts.convert_ldm_vae_checkpoint),
    }
    given: dict[str, Any] = {
        part: _convert(cls, convert, tensors, config / part, dtype)
        for part, (cls, convert) in kinds.items()
    }
    given["tokenizer"] = tokenizers[0]
    if family == "sdxl":
        given["tokenizer_2"] = tokenizers[1]
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    return pipeline.from_single_file(
        str(path), config=str(config), local_files_only=True, torch_dtype=dtype, **given
    )


def _convert(
    cls: Any, convert: Any, tensors: dict[str, torch.Tensor], config: Path, dtype: torch.dtype
) -> nn.Module:
    with init_empty_weights():
        module = cls.from_config(cls.load_config(str(config)))
    values = convert(tensors, module.config)
    # copied, for what is loaded is a view of the file, and files get overwritten
    own = {name: value.to(dtype, copy=True) for name, value in values.items() if value is not None}
    module.load_state_dict(own, strict=False, assign=True)
    return module
