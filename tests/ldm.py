"""Write a base in one file as the original Stable Diffusion code names its tensors: for tests."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from conceptzap.base import Base, original


def write(base: Base, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """The whole of `base` at `path`, fp16, in the layout of its family's original code."""
    named = original.tensors(base.unet, base.vae, base.text_encoders, base.family)
    halves = {name: value.detach().half().contiguous().clone() for name, value in named.items()}
    save_file(halves, path, metadata)
    return path


def configs(base: Base, folder: Path) -> Path:
    """The configs of `base` at `folder`, as they are shipped for a family: no weights, no tokenizers."""
    pipe = base.pipeline()
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if hasattr(part, "save_config"):
            part.save_config(folder / name)
        elif name.startswith("text_encoder"):
            part.config.save_pretrained(folder / name)
    return folder
