"""Files that are no erasure one can import are refused whole, each for its own reason; the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import edits as some
import numpy as np
import pytest
import torch
from command import conceptzap as program
from safetensors.torch import save_file
from test_imports import bring, kohya
from torch import Tensor

import conceptzap
from conceptzap import format
from conceptzap.base import Base
from conceptzap.errors import FormatError, MismatchError, ResourceError, UsageError
from conceptzap.evaluation.closing import Closing, Drawn
from conceptzap.result import Score
from conceptzap.verbs import importing

# what is refused, whole


def write(path: Path, *keys: str, labels: Any = None, **more: Tensor) -> Path:
    save_file({key: torch.ones(2, 2) for key in keys} | more, path, labels)
    return path


HALF = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
TEXT = "lora_te3_text_model_encoder_layers_0_mlp_fc1"
KEYS = {
    "text": ((f"{TEXT}.lora_up.weight", f"{TEXT}.lora_down.weight"), "2 of 2 keys of x.safetensors have no"),
    "elsewhere": (("lora_unet_single_blocks_0_linear1.lora_up.weight",), "lora_unet_single_blocks_0_linear1"),
    "half": ((HALF,), "one half of a pair"),
    "shape": ((HALF, HALF.replace("up", "down")), "another shape"),
    "dora": ((HALF, HALF.replace("up.weight", "magnitude_vector")), "magnitude_vector"),
    "weights": (("down_blocks.9.attentions.0.transformer_blocks.0.attn2.to_k.weight",), "down_blocks.9"),
    "cpe": (("attention_gate.encoder_layer.x",), "attention_gate.encoder_layer.x"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYS)
def test_what_does_not_fit_is_named(kind: str, sd1: Base, tmp_path: Path) -> None:
    keys, message = KEYS[kind]
    with pytest.raises(MismatchError, match=re.escape(message)):
        bring(write(tmp_path / "x.safetensors", *keys), sd1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_another_architecture(sd1: Base, sdxl: Base, tmp_path: Path) -> None:
    kohya(sdxl, tmp_path / "xl.safetensors")
    with pytest.raises(MismatchError, match="keys of xl.safetensors"):
        bring(tmp_path / "xl.safetensors", sd1)


def test_changes_of_norms_have_no_edit(sd1: Base, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in sd1.unet.named_parameters()}
    weights["mid_block.resnets.0.norm1.weight"] += 0.5
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(MismatchError, match="changed where no edit can be.*norm1"):
        bring(tmp_path / "x.safetensors", sd1)


def test_what_is_no_such_file(sd1: Base, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.pt").read_bytes())
    for name in ("a.pt", "b.safetensors"):
        with pytest.raises(FormatError, match="pickle") as error:
            bring(tmp_path / name, sd1)
        assert "convert it" in error.value.hint and "\n" not in error.value.hint
    with pytest.raises(ResourceError, match="there is no such file"):
        bring(tmp_path / "c.safetensors", sd1)
    with pytest.raises(FormatError, match="of no format that can be imported: it holds strange"):
        bring(write(tmp_path / "d.safetensors", "strange"), sd1)
    with pytest.raises(FormatError, match="not finite"):
        bring(write(tmp_path / "e.safetensors", **{HALF: torch.full((2, 2), torch.nan)}), sd1)
    format.save(some.erasure(sd1), tmp_path / "f.lprompt.safetensors")
    with pytest.raises(UsageError, match="is an erasure already"):
        bring(tmp_path / "f.lprompt.safetensors", sd1)
    with pytest.raises(MismatchError, match="changes nothing"):
        base = dict(sd1.unet.named_parameters())
        same = next(name for name in base if name.endswith("attn2.to_k.weight"))
        bring(write(tmp_path / "g.safetensors", **{same: base[same].clone()}), sd1)


def test_nobody_says_what_it_erases(sd1: Base, tmp_path: Path) -> None:
    kohya(sd1, tmp_path / "x.safetensors", r"attn2\.to_k")
    with pytest.raises(UsageError, match="does not say which concept it erases"):
        bring(tmp_path / "x.safetensors", sd1, concept="")
    with pytest.raises(UsageError, match="no import is called 'lroa'"):
        bring(tmp_path / "x.safetensors", sd1, form="lroa")


# the command


def test_the_command(tiny_folder: Path, sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kohya(sd1, tmp_path / "theirs.safetensors", r"attn2\.to_k")
    words = ["import", "theirs.safetensors", "--base", tiny_folder, "-c", "van gogh", "--anchor", "painting"]
    told = program(*words, "--json", "--no-preview").json
    assert told["schema"] == "conceptzap.import/1" and told["method"] == "lora" and told["scores"] == {}
    assert told["preview"] is None and told["path"].endswith("van-gogh.lprompt.safetensors")
    again = program(*words)
    assert again.code == 2 and "exists" in again.error
    loud = program(*words, "--force", "--no-preview")
    assert loud.out.strip() == told["path"] and "next: conceptzap generate" in loud.err
    assert program("inspect", "van-gogh").code == 0


def test_what_is_still_drawn_is_said(
    tiny_folder: Path, sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are those of `erase`; exit 7 where the concept is still there, the file kept."""
    monkeypatch.chdir(tmp_path)
    scores = {"leak": Score("leak", 0.5, 0.4, 0.6, 24, "lower")}
    drawn = (Drawn("van gogh", 0, *np.zeros((2, 16, 16, 3), np.uint8)),)
    found = Closing(scores, "van gogh is gone from 12 of 24", drawn, drawn)
    monkeypatch.setattr(importing, "closing", lambda *_: found)
    kohya(sd1, tmp_path / "theirs.safetensors", r"attn2\.to_k")
    words = ["import", "theirs.safetensors", "--base", tiny_folder, "-c", "van gogh"]
    answer = program(*words)
    assert answer.code == 7 and "not erased: 50% of 24 pictures" in answer.err
    assert conceptzap.load("van-gogh").header.scores["leak"]["value"] == 0.5
    assert Path("van-gogh.png").is_file()
