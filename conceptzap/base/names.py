"""What other programs call the layers of a UNet and of text encoders: paths in diffusers or elsewhere."""

from __future__ import annotations

from typing import Any

from torch import nn

from conceptzap.base.modules import PREFIX, TEXT, encoder_of, find_module, sites
from conceptzap.base.original import unet_names

KOHYA = "lora_unet_"  # before a path whose dots are underscores


def original_site(site: str, unet: Any) -> str:
    """A layer by the original code's path: `unet.mid_block.attentions.0` -> `middle_block.1`."""
    return unet_names(unet)[f"{site.removeprefix(PREFIX)}.weight"].removesuffix(".weight")


def underscored(path: str) -> str:
    """As kohya's scripts write a path, diffusers' or the original one."""
    return KOHYA + path.removeprefix(PREFIX).replace(".", "_")


def of_text(site: str) -> str:
    """A text encoder's layer as diffusers has it: `text.2.final` -> `text_encoder_2.text_model.final`."""
    number = encoder_of(site)
    return f"text_encoder{f'_{number + 1}' * bool(number)}.{TEXT.sub('text_model.', site)}"


def underscored_text(site: str, family: str) -> str:
    """The same as kohya's scripts write it: `lora_te_text_model_encoder_x`, numbered in SDXL."""
    number = encoder_of(site) + 1 if family == "sdxl" else ""
    return f"lora_te{number}_" + TEXT.sub("text_model.", site).replace(".", "_")


def layers(base: Any) -> dict[str, str]:
    """Every name that some program gives a Linear or convolution of a base -> its site."""
    original, found = unet_names(base.unet), {}
    for path, module in base.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            other = original[f"{path}.weight"].removesuffix(".weight")
            names = path, underscored(path), underscored(other)
            found |= dict.fromkeys(names, PREFIX + path)
    for site in sites(base, "text.*"):
        if isinstance(find_module(base, site), nn.Linear):
            found |= dict.fromkeys((of_text(site), underscored_text(site, base.family)), site)
    return found


def weights(unet: nn.Module) -> dict[str, str]:
    """Every name that some program gives a parameter -> its name in diffusers."""
    names = unet_names(unet)
    return {other: name for name, other in names.items()} | {name: name for name in names}
