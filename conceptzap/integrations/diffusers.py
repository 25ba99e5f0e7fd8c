"""The UNet of a folder that `export --to diffusers` wrote: erased as soon as diffusers has loaded it.

Import this module, then `DiffusionPipeline.from_pretrained(folder)`, or any class that takes such a UNet
(image to image, inpainting by the same UNet, from_pipe): every call is erased or raises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from diffusers import ModelMixin, UNet2DConditionModel
from safetensors import safe_open

from conceptzap import format
from conceptzap.base import identity
from conceptzap.edit import Erasure
from conceptzap.errors import MismatchError, RefusedError
from conceptzap.exports.diffusers import CLASS, FILE, PLAIN
from conceptzap.runtime.attach import Attachment
from conceptzap.runtime.receipt import Receipt

__all__ = ["ErasedUNet2DConditionModel", "ModelMixin"]  # diffusers looks for both here
WEIGHTS = "diffusion_pytorch_model.safetensors"


class ErasedUNet2DConditionModel(UNet2DConditionModel):
    """A UNet with an erasure on it; `receipt` counts what it did since it was loaded."""

    erasure: Erasure
    _attachment: Attachment

    @classmethod
    def from_pretrained(cls, path: Any, subfolder: str | None = None, **options: Any) -> Self:
        """Load the plain UNet as diffusers would, with its options, and put the erasure on.

        Raises `FormatError` for a damaged erasure and `MismatchError` for weights that it was not made for.
        """
        folder = Path(path, subfolder or "")
        erasure = format.load(folder / FILE)
        unet = UNet2DConditionModel.from_pretrained(str(folder / PLAIN), **options).eval()
        _check(folder / PLAIN / WEIGHTS, erasure)
        unet.__class__ = cls
        unet.erasure, unet._attachment = erasure, Attachment(unet, erasure.edits, ours=False)
        return unet

    @property
    def receipt(self) -> Receipt:
        return self._attachment.receipt

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        raise RefusedError(
            "an erased pipeline is not saved this way, for what is written would be the plain UNet",
            "copy the folder that it was loaded from, or export it again",
        )


def _check(path: Path, erasure: Erasure) -> None:
    """Raise `MismatchError` unless the weights are those that the erasure was made on."""
    for part in ("attn2", "unet"):
        mark = erasure.header.base.fingerprint.get(part)
        if mark is None:
            continue
        with safe_open(path, "pt") as file:
            names = [n for n in sorted(file.keys()) if part == "unet" or ".attn2." in n]
            found = identity.digest((name, file.get_tensor(name)) for name in names)
        if found != mark:
            title = erasure.header.title
            raise MismatchError(f"{title!r} was made for other weights than {path} has", "export it again")


assert ErasedUNet2DConditionModel.__name__ == CLASS
