"""Write the trained parts as one plain diffusers folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPTokenizer

from conceptzap.demo.recipe.train_unet import Painter, build_scheduler

LIMIT_BYTES = 30_000_000


def write_checkpoint(
    painter: Painter, tokenizer: CLIPTokenizer, vae: AutoencoderKL, spread: float, folder: Path
) -> int:
    """Replace `folder` by the checkpoint; returns its size in bytes.

    `spread` is the standard deviation of the VAE's latents. The text encoder stays in fp32:
    transformers keeps the dtype it finds, diffusers loads the others as fp32, and mixed parts
    would fail.
    """
    vae.register_to_config(scaling_factor=1 / spread, force_upcast=False)
    painter.unet.set_attn_processor(AttnProcessor2_0())
    pipe = StableDiffusionPipeline(
        vae=vae.half(), unet=painter.unet.half(), text_encoder=painter.text.float(),
        tokenizer=tokenizer, scheduler=build_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    _write_slow_vocabulary(tokenizer, fresh / "tokenizer")
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(f"{fresh}: {size} bytes, more than the {LIMIT_BYTES} a checkpoint may be")
    _swap(fresh, folder)
    return size


def _write_slow_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt, which transformers before 5 reads in place of tokenizer.json."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def _swap(fresh: Path, folder: Path) -> None:
    card = folder / "README.md"
    if card.exists():
        shutil.copy(card, fresh / "README.md")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
