"""Exports: erasures -> somebody else's format. A member has `check`, `place`, `write` and `use`.

`check(order)` refuses what the format cannot hold: all of an erasure goes in, or none of it.
`place(order, output)` is where it goes, unless nothing can go there. `write(base, order, target,
report)` writes it and returns what is to be said of it. `use(target)` is how others read it.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap.edit import Edit, Header, Json
from conceptzap.errors import RefusedError, ResourceError, UsageError, escape
from conceptzap.format import atomic
from conceptzap.format.naming import SUFFIX

if TYPE_CHECKING:
    import torch

    from conceptzap.base import Base

NOTE = "conceptzap.json"  # in a folder that an export wrote: what went in
SHIP = "ship the .lprompt.safetensors file itself and load it with conceptzap"


@dataclass(frozen=True)
class Order:
    """What to export and how: the edits of all erasures, at their strengths, under one header.

    `sources`: title, digest and strength of each erasure. `dtype` is auto or a name of `devices`; `keys`
    is a style of names, where a format has several.
    """

    header: Header
    edits: tuple[Edit, ...]
    sources: tuple[Mapping[str, Json], ...]
    rank: int | None = None
    dtype: str = "auto"
    force: bool = False
    keys: str | None = None


def is_plain(edit: Edit) -> bool:
    """Whether it is another weight and nothing else, for every prompt, row and timestep."""
    return edit.op == "weight" and not edit.gates and not edit.params


def refuse(to: str, order: Order, misfits: Sequence[Edit], hint: str = SHIP) -> None:
    """Raise a `RefusedError` that lists the edits which the format cannot hold, if any."""
    if misfits:
        count = f"{len(misfits)} of {_many(len(order.edits), 'edit')}"
        raise RefusedError(f"a {to} cannot hold {count}: {_listed(misfits)}", hint)


def check_whole(to: str, order: Order) -> None:
    """`UsageError` for options that only a LoRA has."""
    if order.rank is not None:
        raise UsageError(f"a {to} has no --rank: it holds every change whole", "leave it out")
    if order.keys is not None:
        raise UsageError(f"a {to} has no --keys: its names are its own", "leave it out")


def place_folder(order: Order, output: Path) -> Path:
    """`output` with links resolved; with `force` it may be a folder that an export wrote."""
    if output.name.endswith(SUFFIX):
        raise UsageError(f"{output.name!r} is what an erasure is called", "leave .lprompt out")
    if output.suffix == ".safetensors":
        raise UsageError(f"{output.name!r} would be a folder", "leave .safetensors out")
    target = Path(os.path.realpath(output))
    if os.path.lexists(target):
        check_replaceable(target, order.force)
    atomic.check_writable(target.with_name(f".{target.name}.probe"))
    return target


def check_replaceable(target: Path, force: bool) -> None:
    """`UsageError` unless it is a folder that an export wrote, which `force` lets go."""
    name = escape(target)
    if not target.is_dir():
        raise UsageError(f"{name} is not a folder", "name a new folder for the export")
    if not force:
        raise UsageError(f"{name} exists", "choose another name, or overwrite it with --force")
    if not (target / NOTE).is_file():
        raise UsageError(
            f"{name} was not written by export, so it is not replaced",
            "choose another name, or remove it yourself",
        )


def _listed(edits: Iterable[Edit]) -> str:
    """For example `tokens at 7 modules behind 1 gate; weight (delta) at 2 modules`."""
    counts: Counter[tuple[str, int]] = Counter()
    for edit in edits:
        slots = f" ({', '.join(sorted(edit.tensors))})" if edit.op == "weight" else ""
        counts[edit.op + slots, len(edit.gates)] += len(edit.sites)
    return "; ".join(
        f"{what} at {_many(sites, 'module')}" + (f" behind {_many(gates, 'gate')}" if gates else "")
        for (what, gates), sites in sorted(counts.items())
    )


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def asked_dtype(order: Order, among: Sequence[torch.dtype]) -> torch.dtype | None:
    """The dtype asked for, None for auto; `UsageError` for one that is not `among` the format's."""
    from conceptzap.base.devices import DTYPES

    if order.dtype == "auto":
        return None
    if DTYPES.get(order.dtype) not in among:
        names = ", ".join(map(name_of, among))
        raise UsageError(f"--dtype {order.dtype!r} is not for this format", f"use auto, {names}")
    return DTYPES[order.dtype]


def origin(base: Base, order: Order) -> dict[str, Json]:
    """Where an export came from: erasures by digest, and the base that they were put into."""
    sites = [site for edit in order.edits for site in edit.sites]
    return {
        "anchors": list(order.header.anchors),
        "base": base.reference(sites).record(),
        "concepts": list(order.header.concepts),
        "erasures": [dict(source) for source in order.sources],
    }


# -- the disk


def check_space(made: Base, target: Path) -> None:
    """`ResourceError` where there is no room for a whole checkpoint."""
    parts = (made.unet, *made.text_encoders, made.vae)
    needed = sum(value.nbytes for part in parts for value in part.parameters())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ResourceError(
            f"no space for {escape(target)}: {needed} bytes needed, {free} free",
            "make room, or write to another disk",
        )


@contextmanager
def disk(target: Path) -> Iterator[None]:
    """What a disk says no to, as the error a user can act on."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = escape(getattr(error, "strerror", None) or error)
        hint = "make room, or choose a folder that can be written to with --output"
        raise ResourceError(f"cannot write {escape(target)}: {reason}", hint) from error
