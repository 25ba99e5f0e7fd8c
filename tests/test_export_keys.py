"""A LoRA in every style of keys, read by the programs that take it, and by our own import."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import edits as some
import pytest
from command import conceptzap as program
from exported import CLOSE, named, save, seen, through_diffusers
from safetensors.torch import load_file

import conceptzap
from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.exports import lora

START = {"kohya": "lora_unet_", "original": "lora_unet_", "diffusers": "unet."}


def edits(base: Base) -> list[Edit]:
    """A pair for all keys and values, and one at each kind of layer."""
    return [some.shared(base), *(some.low_rank(base, path, seed=i) for i, path in enumerate(named(base)[::3]))]


def written(base: Base, keys: str, folder: Path) -> tuple[Path, list[Edit]]:
    made = edits(base)
    path = save(folder, base, "a", made)
    return conceptzap.export(path, "lora", folder / "out", base=base, keys=keys).path, made


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
def test_diffusers_reads_it(keys: str, base: Base, tmp_path: Path) -> None:
    is_read(base, keys, tmp_path)


def test_diffusers_reads_the_original_paths(sdxl: Base, tmp_path: Path) -> None:
    """For SDXL alone, whose LoRAs of kohya's scripts have them."""
    is_read(sdxl, "original", tmp_path)


def is_read(base: Base, keys: str, folder: Path) -> None:
    path, made = written(base, keys, folder)
    assert all(key.startswith(START[keys]) for key in load_file(path))
    assert some.far(seen(through_diffusers(base, path)), seen(base, made)) < CLOSE


def test_peft_reads_it(base: Base, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path, made = written(base, "peft", tmp_path)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.unet), str(path))
    theirs = replace(base, unet=model.base_model.model.eval())
    assert some.far(seen(theirs), seen(base, made)) < CLOSE
    assert "adapter_config.json" in {one.name for one in path.iterdir()}


@pytest.mark.parametrize("keys", lora.KEYS)
def test_our_own_import_reads_it(keys: str, sd1: Base, tmp_path: Path) -> None:
    path, made = written(sd1, keys, tmp_path)
    back = conceptzap.import_(path, "van gogh", base=sd1, output=tmp_path / "back", preview=False)
    assert some.far(seen(sd1, back.erasure.edits), seen(sd1, made)) < 1e-3


def test_styles_that_there_are_not(sd1: Base, tmp_path: Path) -> None:
    path = str(save(tmp_path, sd1, "a", [some.shared(sd1)]))
    for words, message in (
        (("--to", "lora", "--keys", "kohyaa"), "--keys 'kohyaa' is unknown"),
        (("--to", "checkpoint", "--keys", "kohya"), "has no --keys"),
    ):
        answer = program("export", path, *words, "-o", tmp_path / "x", "--base", "nowhere")
        assert answer.code == 2 and message in answer.error
    folder = tmp_path / "out"
    conceptzap.export(path, "lora", folder, base=sd1, keys="peft")
    answer = program("export", path, "--to", "lora", "--keys", "peft", "-o", folder, "--base", "nowhere")
    assert answer.code == 2 and "exists" in answer.error
