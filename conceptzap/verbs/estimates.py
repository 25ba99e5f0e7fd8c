"""What an erasure will cost here: what the last one like it took on this machine. No torch.

Seconds and memory depend on the machine, on what is cached and on what the method does, so that nothing
short of a run tells them. Each run that ends leaves its own in the cache, under all that it was asked for
and once more under base, method and device alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import conceptzap
from conceptzap.edit import Json, canonical_json
from conceptzap.errors import ConceptZapError
from conceptzap.format import atomic, cache

if TYPE_CHECKING:
    from conceptzap.verbs.planning import ErasePlan

KIND = "costs"
LIMIT = 2**12  # bytes of such a file
COSTS = {"seconds": float, "peak_bytes": int, "bytes": int}


def remember(plan: ErasePlan, made: Mapping[str, Json]) -> None:
    """Keep what a run took: `COSTS` of `made`. A cache that cannot be written is no error."""
    data = json.dumps({name: made[name] for name in COSTS}).encode()
    for path in _paths(plan):
        with suppress(OSError, ConceptZapError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_atomic(path, data, force=True)


def recall(plan: ErasePlan) -> dict[str, Json] | None:
    """`COSTS` of the last run with these settings here (`same`), else with others; None for no run yet."""
    for same, path in zip((True, False), _paths(plan), strict=True):
        with suppress(OSError, ValueError, TypeError, KeyError, ConceptZapError):
            found = json.loads(atomic.read_regular(path, LIMIT))
            return {name: kind(found[name]) for name, kind in COSTS.items()} | {"same": same}
    return None


def _paths(plan: ErasePlan) -> tuple[Path, Path]:
    """The files of this plan's costs, and of whatever shares its base, method and device."""
    base = os.path.abspath(plan.base) if os.path.exists(plan.base) else plan.base
    shared: dict[str, Json] = {
        "machine": os.uname().nodename, "version": conceptzap.__version__, "base": base,
        "method": plan.method, "device": plan.device, "dtype": plan.dtype, "harden": plan.harden,
    }  # fmt: skip
    own: dict[str, Json] = {
        "concepts": len(plan.task.concepts), "config": dataclasses.asdict(plan.settings),
        "preview": plan.preview, "limit": plan.limit, "patience": plan.patience, "after": len(plan.after),
        "samples": plan.sample_every,
    }  # fmt: skip
    names = (hashlib.sha256(canonical_json(key).encode()).hexdigest() for key in (shared | own, shared))
    exact, near = (cache.folder(KIND) / f"{name}.json" for name in names)
    return exact, near
