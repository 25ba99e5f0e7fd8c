"""How much fits: rows of a UNet call by what is free, halved when that was too many; recomputation."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from conceptzap.base import Base
from conceptzap.errors import ResourceError, ran_out_of_memory

T = TypeVar("T")
# activations alive at once in a row of a UNet call, counted in feature maps [c0, h, w] of its first block
FEATURE_MAPS = 64
ROOM = 4 * 2**30  # bytes that a call may take although more is free: larger calls are hardly faster


def rows_that_fit(base: Base, most: int) -> int:
    """How many rows a UNet call without gradients may have here, 1 to `most`.

    An estimate from the UNet's first block, on the safe side. A small base always gets `most`, so
    that what it draws does not depend on what else runs.
    """
    _, height, width = base.latent_shape
    channels = base.unet.config.block_out_channels[0]
    row = FEATURE_MAPS * channels * height * width * base.dtype.itemsize
    return max(1, min(most, min(ROOM, free_bytes() // 2) // row))


def in_chunks(n: int, rows: int, work: Callable[[slice], T]) -> Iterator[T]:
    """What `work` makes of n items, `rows` at a time; half as many from where memory runs out on.

    Raises `ResourceError` where one item is too much.
    """
    start = 0
    while start < n:
        chunk = slice(start, min(start + rows, n))
        try:
            made = work(chunk)
        except (MemoryError, RuntimeError) as error:
            lack = shortage(error)
            if not lack:
                raise
        else:
            yield made
            start = chunk.stop
            continue
        # out here, where the error no longer holds the frames that hold the tensors
        release()
        if rows == 1:
            raise ResourceError(
                f"out of memory with one picture at a time: {lack}",
                "close other programs, or use another --device or --dtype",
            )
        rows = max(1, min(rows, chunk.stop - chunk.start) // 2)


@contextmanager
def recomputing(base: Base) -> Iterator[None]:
    """Activations are computed again for the backward pass instead of kept (arXiv 1604.06174)."""
    already = base.unet.is_gradient_checkpointing
    base.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not already:
            base.unet.disable_gradient_checkpointing()


def shortage(error: BaseException) -> str:
    """What was asked for and what is free, if the error is one of memory, else ""."""
    if not ran_out_of_memory(error):
        return ""
    asked = re.search(r"allocate ([\d.]+) ?(bytes|[KMG]iB)", str(error))
    wanted = f"{asked[1]} {asked[2]}" if asked else "an unknown size"
    return f"{wanted} asked for, {free_bytes() / 2**30:.1f} GiB free"


def free_bytes() -> int:
    """Free memory of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    with suppress(OSError):  # Linux: what files are cached in is free too
        if found := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # a Mac does not say


def peak_bytes() -> int:
    """The most memory held since the start, or `forget_peak`: of a GPU that was used, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024  # kilobytes but on a Mac


def forget_peak() -> None:
    """Let `peak_bytes` count from here, where the system can: a GPU, and Linux for the machine."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
