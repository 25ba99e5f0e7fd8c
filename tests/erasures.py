"""Small real erasure files for tests, made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from conceptzap import format
from conceptzap.base import CROSS_V, Base
from conceptzap.edit import Edit, Erasure, Header
from conceptzap.trust import canary


def nudge(base: Base, concept: str, size: float = 0.02) -> Erasure:
    """An erasure of `concept` that changes every cross-attention value a little and erases nothing."""
    generator = torch.Generator().manual_seed(0)
    edits = []
    for site in base.sites(CROSS_V)[:2]:
        out, width = base.module(site).weight.shape
        up = size * torch.randn(out, 1, generator=generator)
        down = torch.randn(1, width, generator=generator) / width**0.5
        edits.append(Edit("weight", (site,), {"up": up, "down": down}))
    made = sorted(edits, key=lambda edit: edit.name)
    header = Header(
        title=concept,
        concepts=(concept,),
        anchors=("",),
        base=base.reference([site for edit in made for site in edit.sites]),
        made=({"method": "none", "config": {}, "seed": 0},),
        canary=canary.make(base, made, f"a photo of a {concept}"),
    )
    return format.seal(Erasure(header, tuple(made)))


def write(base: Base, concept: str, folder: Path) -> Path:
    path = folder / f"{concept.replace(' ', '-').lower()}.lprompt.safetensors"
    format.save(nudge(base, concept), path)
    return path
