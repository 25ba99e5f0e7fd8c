"""What other programs call the layers of a UNet: by diffusers' path or by the original code's."""

from __future__ import annotations

from typing import Any

from torch import nn

from conceptzap.base.base import PREFIX
from conceptzap.base.original import unet_names

KOHYA = "lora_unet_"  # before a path whose dots are underscores


def original_site(site: str, unet: Any) -> str:
    """A layer by the original code's path: `unet.mid_block.attentions.0` -> `middle_block.1`."""
    return unet_names(unet)[f"{site.removeprefix(PREFIX)}.weight"].removesuffix(".weight")


def underscored(path: str) -> str:
    """As kohya's scripts write a path, diffusers' or the original one."""
    return KOHYA + path.removeprefix(PREFIX).replace(".", "_")


def layers(unet: nn.Module) -> dict[str, str]:
    """Every name that some program gives a Linear or convolution -> its site."""
    original, found = unet_names(unet), {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            other = original[f"{path}.weight"].removesuffix(".weight")
            names = path, underscored(path), underscored(other)
            found |= dict.fromkeys(names, PREFIX + path)
    return found


def weights(unet: nn.Module) -> dict[str, str]:
    """Every name that some program gives a parameter -> its name in diffusers."""
    names = unet_names(unet)
    return {other: name for name, other in names.items()} | {name: name for name in names}
