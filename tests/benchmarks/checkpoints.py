"""Checkpoints of the shipped configs at full width, of random weights: for speed and memory alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from conceptzap.base.bpe import clip_tokenizer
from conceptzap.base.single_file import CONFIGS, PADS


def build(family: str, folder: Path, side: int | None) -> None:
    """Write a diffusers folder of the shipped configs, fp16, with random weights of unit gain."""
    import diffusers
    import transformers

    config, made = CONFIGS / family, {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not (config / part).is_dir():
            continue
        settings = json.loads((config / part / "config.json").read_text())
        if part == "unet":
            settings |= {"sample_size": side or settings["sample_size"]}
        kind = {
            "unet": diffusers.UNet2DConditionModel,
            "vae": diffusers.AutoencoderKL,
            "text_encoder": transformers.CLIPTextModel,
            "text_encoder_2": transformers.CLIPTextModelWithProjection,
        }[part]
        made[part] = _random(kind, settings)
    for number, pad in enumerate(PADS[family], 1):
        made["tokenizer" if number == 1 else f"tokenizer_{number}"] = clip_tokenizer(pad)
    schedule = json.loads((config / "scheduler" / "scheduler_config.json").read_text())
    made["scheduler"] = diffusers.DDIMScheduler.from_config(schedule)
    if family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**made, add_watermarker=False)
    else:
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**made, **off)
    pipe.save_pretrained(str(folder))


def _random(kind: Any, settings: dict[str, Any]) -> Any:
    """A module on empty weights first, for initialising them twice costs minutes."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        is_diffusers = hasattr(kind, "from_config")
        module = kind.from_config(settings) if is_diffusers else kind(kind.config_class(**settings))
    module = module.half().to_empty(device="cpu") if is_diffusers else _materialised(module.half())
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            gain = weight[0].numel() ** -0.5
            weight.data = torch.empty(weight.shape).normal_(0, gain, generator=generator).half()
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def _materialised(module: Any) -> Any:
    """Empty parameters made real; buffers, which hold position ids, stay what they are."""
    for owner in module.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
    return module
