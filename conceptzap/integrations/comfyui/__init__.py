"""ComfyUI nodes: load an erasure, put it on a MODEL at a strength, read its receipt.

Install: `pip install conceptzap` into ComfyUI's Python, and this folder as `ComfyUI/custom_nodes/conceptzap`
(a copy or a link; or from the registry). Erasures lie in `ComfyUI/models/lprompts`, ending in
`.lprompt.safetensors`. Load Erasure -> Apply Erasure -> KSampler; Erasure Receipt, behind the sampler, says
in how many rows of its UNet calls each erasure was open. A model without the node draws the base's picture,
bit for bit; an edit that did not run raises, and no picture comes out.
"""

from __future__ import annotations

import os
from typing import Any

from conceptzap import format
from conceptzap.edit import Erasure
from conceptzap.integrations import patcher

FOLDER, SUFFIX = "lprompts", ".lprompt.safetensors"
CATEGORY = "conceptzap"


def _folder() -> Any:
    """ComfyUI's table of folders, ours in it; erasures are found in all that the user has named there."""
    import folder_paths  # ComfyUI's own

    if FOLDER not in folder_paths.folder_names_and_paths:
        place = os.path.join(folder_paths.models_dir, FOLDER)
        folder_paths.folder_names_and_paths[FOLDER] = ([place], {".safetensors"})
    return folder_paths


class LoadErasure:
    """A file -> an erasure, checked whole: digest, schema, finite values."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES = ("ERASURE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = [name for name in _folder().get_filename_list(FOLDER) if name.endswith(SUFFIX)]
        return {"required": {"file": (files,)}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        return format.read_header(_folder().get_full_path_or_raise(FOLDER, file)).digest

    def load(self, file: str) -> tuple[Erasure]:
        return (format.load(_folder().get_full_path_or_raise(FOLDER, file)),)


class ApplyErasure:
    """A MODEL -> the same without the concept. Several add up, in any order."""

    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05})
        return {"required": {"model": ("MODEL",), "erasure": ("ERASURE",), "strength": strength}}

    def apply(self, model: Any, erasure: Erasure, strength: float) -> dict[str, Any]:
        erased = patcher.put(model, erasure, strength)
        wrapper = patcher.on(erased)
        modules = {site for edit in wrapper.erased.edits for site in edit.sites}
        told = [f"{erasure.header.title}: {len(modules)} modules of this model in all"]
        told += [f"{title} was made and measured on another checkpoint" for title in wrapper.erased.foreign()]
        return {"ui": {"text": told}, "result": (erased,)}


class ErasureReceipt:
    """What the erasures of a MODEL did while these latents were drawn; the latents pass through."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "read", True
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "receipt")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "model": ("MODEL",)}}

    def read(self, latent: Any, model: Any) -> dict[str, Any]:
        wrapper = patcher.on(model)
        lines = wrapper.erased.lines() if wrapper else ["no erasure is on this model"]
        return {"ui": {"text": lines}, "result": (latent, "\n".join(lines))}


NODE_CLASS_MAPPINGS = {
    "ConceptZapLoad": LoadErasure,
    "ConceptZapApply": ApplyErasure,
    "ConceptZapReceipt": ErasureReceipt,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ConceptZapLoad": "Load Erasure",
    "ConceptZapApply": "Apply Erasure",
    "ConceptZapReceipt": "Erasure Receipt",
}
