"""A base by its name, or over the parts of somebody's pipeline."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import torch

from conceptzap.base import devices, layout, loading
from conceptzap.base.base import Base
from conceptzap.errors import MismatchError
from conceptzap.words import with_article


def load_base(
    name: str = "demo", device: str = "auto", dtype: str = "auto", prediction: str | None = None
) -> Base:
    """The checkpoint called `name`: demo, a folder, a .safetensors file, or a hub id[@revision].

    `device`: auto (cuda, then mps, then cpu), cpu, cuda[:n], mps. `dtype`: auto (fp16 on cuda, else
    fp32), float32, float16, bfloat16; the CPU always computes in fp32. `prediction`: epsilon or
    v_prediction where the checkpoint does not say. Raises `UsageError` for a word that means
    nothing, `ResourceError` for a device or checkpoint that is missing, broken or pickled,
    `MismatchError` for an architecture or weights that cannot be used.
    """
    place = devices.pick_device(device)
    return _placed(name, place, devices.pick_dtype(dtype, place), prediction)


def _placed(name: str, place: torch.device, dtype: torch.dtype, prediction: str | None) -> Base:
    parts = loading.read(name, dtype, prediction)
    found = {key: value for key, value in vars(parts).items() if key != "prints"}
    for module in (parts.unet, *parts.text_encoders, parts.vae):
        module.to(place)
        loading.check_finite(module, name)
    base = Base(**found, device=place, dtype=dtype).frozen()
    base._prints.update(parts.prints)
    return base


def from_pipeline(pipe: Any) -> Base:
    """A base over the modules of a diffusers pipeline, which stays as it is, offloaded or not.

    Raises `MismatchError` for a pipeline without a UNet that reads text.
    """
    kind = type(pipe).__name__
    encoders, tokenizers = (
        tuple(part for part in (getattr(pipe, f"{kind}{n}", None) for n in ("", "_2")) if part)
        for kind in ("text_encoder", "tokenizer")
    )
    if getattr(pipe, "unet", None) is None:
        raise MismatchError(f"{with_article(kind)} has no UNet that reads text", layout.USABLE)
    if getattr(pipe, "text_encoder", None) is None:
        raise MismatchError(f"this {kind} has {layout.NO_TEXT}", layout.USABLE)
    scheduler = dict(pipe.scheduler.config)
    prediction = scheduler.get("prediction_type", "epsilon")
    loading.check_prediction(prediction, f"this {kind}")
    family = loading.family_of(pipe.unet.config, encoders)
    return Base(
        unet=pipe.unet,
        text_encoders=encoders,
        tokenizers=tokenizers,
        vae=pipe.vae,
        scheduler_config=scheduler,
        prediction=prediction,
        family=family,
        id=PurePath(str(pipe.config.get("_name_or_path") or kind)).name,
        revision="",
        device=_device(pipe),
        dtype=pipe.unet.dtype,
        zero_negative=layout.zeros_negative(pipe.config, family),
    )


def _device(pipe: Any) -> torch.device:
    """Where a pipeline computes: where offloading says, else where its parts are."""
    device = pipe._execution_device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in pipe.unet.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in places if place is not None), "cpu"))
