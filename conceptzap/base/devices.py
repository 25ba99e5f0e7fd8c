"""Where to compute and in which numbers."""

from __future__ import annotations

import torch

from conceptzap.errors import ResourceError, UsageError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def available() -> list[str]:
    """Devices of this machine, the fastest first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: auto, cpu, mps, cuda or cuda:n.

    Raises `UsageError` for any other word and `ResourceError` for a device that is not here.
    """
    found = available()
    if name == "auto":
        return torch.device(found[0])
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (index or "0").isdecimal():
        raise UsageError(f"--device {name!r} is no device", f"use auto or: {', '.join(found)}")
    exact = f"cuda:{int(index or 0)}" if kind == "cuda" else kind
    if exact not in found:
        raise ResourceError(f"this machine has no {name}", f"available: {', '.join(found)}")
    return torch.device(exact)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name` on `device`; auto is fp16 on cuda and fp32 elsewhere.

    A CPU computes in fp32 whatever is asked, for half precision is slow there and overflows.
    """
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"--dtype {name!r} is unknown", "use auto, float32, float16 or bfloat16")
    if device.type == "cpu":
        return torch.float32
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES[name]
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ResourceError(f"{device} cannot compute in bfloat16", "use --dtype float16")
    return dtype
