"""What this installation consists of: versions, devices, disk, cache, the built-in checkpoint."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from conceptzap import cache

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "typer", "rich")
# UNet weights: the one file without which the built-in checkpoint is none
DEMO = Path(__file__).parent / "demo" / "checkpoint"
DEMO_UNET = DEMO / "unet" / "diffusion_pytorch_model.safetensors"


def version(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def version_line() -> str:
    """`conceptzap 0.1.0 (torch 2.13.0, diffusers 0.42.1, python 3.11.2)`."""
    from conceptzap import __version__

    others = ", ".join(f"{name} {version(name)}" for name in PACKAGES[:2])
    return f"conceptzap {__version__} ({others}, python {platform.python_version()})"


def report() -> dict[str, Any]:
    """What to paste under a question. Imports torch."""
    from conceptzap import __version__, devices

    return {
        "conceptzap": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "devices": devices.available(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "demo": {"path": str(DEMO), "present": DEMO_UNET.is_file(), "bytes": cache.size(DEMO)},
        "cache": {"path": str(cache.root()), "bytes": cache.sizes()},
        "disk_free": shutil.disk_usage(_existing(cache.root())).free,
    }


def problems(found: dict[str, Any]) -> list[str]:
    """What in a `report` keeps conceptzap from working, one line each with its mend."""
    missing = [name for name, value in found["packages"].items() if value == "not installed"]
    result = [f"{name} is missing; run `pip install {name}`" for name in missing]
    if not found["demo"]["present"]:
        result.append("the built-in checkpoint is missing; reinstall conceptzap")
    return result


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
