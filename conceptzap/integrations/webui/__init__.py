"""An extension of AUTOMATIC1111's webui and of Forge: erasures on every picture, said in its infotext.

Install: `pip install conceptzap` in webui's venv, and this folder as `extensions/conceptzap` (a copy or a
link). Erasures lie in `models/lprompts`, ending in `.lprompt.safetensors`. They are chosen under Conceptzap
below the prompt, or for good in Settings > Conceptzap, where whoever writes prompts cannot leave them out.

Forge has a ModelPatcher, as ComfyUI has, and gets a clone of it for each sampling. webui has one UNet, which
carries the hooks while a batch is sampled; cross-attention is computed here then, for the program's own
passes over masks. Where an edit did not run, an error stops the batch. Guides are refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conceptzap import format
from conceptzap.edit import Erasure
from conceptzap.errors import UsageError
from conceptzap.integrations import patcher
from conceptzap.integrations.original import Erased
from conceptzap.trust import admission

FOLDER, SUFFIX = "lprompts", ".lprompt.safetensors"


def files(models: str | os.PathLike[str]) -> list[str]:
    """Names of the erasures in a folder of models."""
    place = Path(models) / FOLDER
    return sorted(path.name for path in place.glob(f"*{SUFFIX}")) if place.is_dir() else []


class Session:
    """What is on the program's model: `on` before a sampling, `off` after it and before the next one."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._erased: Erased | None = None

    def on(self, processing: Any, models: str, names: Sequence[str], strength: float) -> None:
        """Put the erasures on the model of this processing, and their names into its infotext.

        Raises `UsageError` for a file that is not there, and what `patcher.put` raises.
        """
        self.off()
        strength = admission.check_strength(strength)
        chosen = [(_load(models, name), strength) for name in dict.fromkeys(names)]
        if not chosen or not strength:
            return
        model = processing.sd_model
        if (forge := getattr(model, "forge_objects", None)) is not None:
            for erasure, _ in chosen:
                forge.unet = patcher.put(forge.unet, erasure, strength)
            self._erased = patcher.on(forge.unet).erased
        else:
            self._erased = Erased(model.model.diffusion_model, chosen, attend=True)
            self._stack.enter_context(self._erased.acting())
        told = ", ".join(f"{one.header.title}:{strength:g} {one.digest[:12]}" for one, _ in chosen)
        processing.extra_generation_params["Erased"] = told

    def off(self) -> list[str]:
        """Take off what is on the UNet; what the erasures did, a line each.

        Raises `SilentEditError` where the UNet was never run with them.
        """
        stack, self._stack, erased, self._erased = self._stack, ExitStack(), self._erased, None
        stack.close()
        return erased.lines() if erased else []

    def drop(self) -> None:
        """`off` after a batch that failed, which has said why."""
        try:
            self.off()
        except Exception:  # noqa: BLE001 (the batch before this one raised already)
            self._erased = None


def _load(models: str, name: str) -> Erasure:
    path = Path(models) / FOLDER / name
    if not path.is_file():
        raise UsageError(f"no erasure {name!r} in {path.parent}", "choose another one, or put it there")
    return format.load(path)
