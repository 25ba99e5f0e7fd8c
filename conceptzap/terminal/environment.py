"""What this installation consists of: versions, devices, disk, cache, the built-in checkpoint."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from conceptzap.format import cache, naming
from conceptzap.terminal import show

LEAST_FREE = 10**9  # bytes
WANTED = ("model_index.json", naming.SUFFIX)  # how a file ends that a checkpoint or an erasure has
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "typer", "rich")
# UNet weights: the one file without which the built-in checkpoint is none
DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
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
    from huggingface_hub import constants

    from conceptzap import __version__
    from conceptzap.base import devices

    found = devices.available()
    return {
        "conceptzap": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "devices": found,
        "gpus": {name: _gpu(name) for name in found if name.startswith("cuda")},
        "cores": _cores(),
        "demo": {"path": str(DEMO), "present": DEMO_UNET.is_file(), "bytes": cache.size(DEMO)},
        "cache": {"path": str(cache.root()), "bytes": cache.sizes()},
        "writable": _writable(cache.root()),
        "disk_free": shutil.disk_usage(_existing(cache.root())).free,
        "offline": constants.HF_HUB_OFFLINE,
        "downloaded": _downloaded(),
    }


def _cores() -> int | None:
    """Those this process may use, where the system says so."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count()


def _gpu(name: str) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(name)
    return {"name": torch.cuda.get_device_name(name), "bytes": total, "free": free}


def _downloaded() -> dict[str, int]:
    """Checkpoints and erasures in the hub's cache, which need no network any more, with their bytes."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return {}
    return {
        repo.repo_id: repo.size_on_disk
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if any(f.file_name.endswith(WANTED) for one in repo.revisions for f in one.files)
    }


def problems(found: dict[str, Any]) -> list[str]:
    """What in a `report` keeps conceptzap from working, one line each with its mend."""
    missing = [name for name, value in found["packages"].items() if value == "not installed"]
    result = [f"{name} is missing; run `pip install {name}`" for name in missing]
    if not found["demo"]["present"]:
        result.append("the built-in checkpoint is missing; reinstall conceptzap")
    if not found["writable"]:
        where = found["cache"]["path"]
        result.append(f"the cache {where} cannot be written; set CONCEPTZAP_CACHE to a folder that can")
    elif found["disk_free"] < LEAST_FREE:
        result.append(f"only {show.size(found['disk_free'])} of disk are free; make room")
    return result


def _writable(path: Path) -> bool:
    near = _existing(path)
    return near.is_dir() and os.access(near, os.W_OK | os.X_OK)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
