"""Small erasures and policies over them, made by hand, and as much of a base as a policy looks at."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from conceptzap import format
from conceptzap.edit import BaseRef, Edit, Erasure, Header
from conceptzap.trust import policy

HEX = "0123456789abcdef" * 4
PRINTS = {"attn2": HEX, "text": HEX[::-1], "unet": "0" * 64}
BASE = BaseRef("sd1", "demo", "", "5" * 64, PRINTS)
SITES = ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",)


def erasure(concept: str = "Van Gogh", base: BaseRef = BASE, **changes) -> Erasure:
    """One low-rank edit whose values depend on the concept."""
    made_on = dataclasses.replace(
        base, fingerprint={p: base.fingerprint[p] for p in ("attn2", "text")}
    )
    generator = torch.Generator().manual_seed(sum(map(ord, concept)))
    tensors = {
        "up": torch.randn(4, 2, generator=generator),
        "down": torch.randn(2, 4, generator=generator),
    }
    edit = dataclasses.replace(Edit("weight", SITES, tensors), **changes)
    return format.seal(Erasure(Header(concept, (concept,), ("",), made_on), (edit,)))


def stored(folder: Path, concept: str = "Van Gogh", name: str = "a", **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{format.SUFFIX}"
    format.save(erasure(concept, **more), path, force=True)
    return path


def locked(folder: Path) -> Path:
    """A policy over two files, beside them."""
    files = [stored(folder, name="b"), stored(folder, "church", name="a")]
    policy.write(folder / "conceptzap.lock", BASE, "demo", files)
    return folder / "conceptzap.lock"


def change(lock: Path, old: str, new: str) -> None:
    text = lock.read_text()
    assert old in text
    lock.write_text(text.replace(old, new))


class Handle:
    """As much of a base as a policy looks at."""

    id = "here"

    def __init__(self, ref: BaseRef = BASE) -> None:
        self.signature, self.prints = ref.signature, dict(ref.fingerprint)

    def fingerprint(self, sites) -> dict[str, str]:
        assert not all(".attn2" in site for site in sites), "every part has to be asked for"
        return self.prints
