"""Files of others that are damaged, odd or of another kind: acted on as meant, or refused whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import edits as some
import pytest
import torch
from safetensors.torch import save_file
from test_imports import TOLERANCE, bring, factors, layers, noise, patched
from test_imports_refused import write
from torch import Tensor

from conceptzap.base import Base
from conceptzap.errors import FormatError, MismatchError, UsageError

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
K = "lora_unet_" + LAYER.replace(".", "_")
UP, DOWN, ALPHA = f"{K}.lora_up.weight", f"{K}.lora_down.weight", f"{K}.alpha"


def pair(base: Base, rank: int = 2) -> dict[str, Tensor]:
    """One layer's factors, as kohya's scripts write them."""
    up, down = factors(base.unet.get_submodule(LAYER), rank, 0)
    return {UP: up, DOWN: down}


def one(value: float) -> Tensor:
    return torch.tensor(value)


HOSTILE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "alpha of two numbers": (lambda p: {**p, ALPHA: torch.ones(2)}, "is not one number"),
    "alpha alone": (lambda p: {**p, ALPHA.replace("to_k", "to_v"): one(1.0)}, "one half of a pair"),
    "alpha that is no number": (lambda p: {**p, ALPHA: one(torch.nan)}, "not finite"),
    "alpha past all numbers": (lambda p: {**p, ALPHA: one(1e30)}, "out of all reason"),
    "grows past all numbers": (
        lambda p: {UP: p[UP] * 1e17, DOWN: p[DOWN] * 1e17, ALPHA: one(1e17)}, "is not finite"
    ),
    "one layer by two names": (
        lambda p: p | {k.replace("mid_block_attentions_0", "middle_block_1"): t + 0 for k, t in p.items()},
        "there by another name",
    ),
    "turned round": (lambda p: {key: tensor.T.contiguous() for key, tensor in p.items()}, "another shape"),
    "ranks that differ": (lambda p: {**p, DOWN: p[DOWN][:1].contiguous()}, "another shape"),
    "no rank": (lambda p: {UP: p[UP][:, :0].contiguous(), DOWN: p[DOWN][:0].contiguous()}, "another shape"),
    "a kernel": (lambda p: {**p, DOWN: p[DOWN][..., None, None].repeat(1, 1, 3, 3)}, "another shape"),
    "a core between them": (lambda p: {**p, UP.replace("_up", "_mid"): torch.ones(2, 2, 3, 3)}, "lora_mid"),
    "a norm of DoRA": (lambda p: {**p, f"{K}.dora_scale": torch.ones(4)}, "dora_scale"),
    "a bias": (lambda p: {**p, f"{K}.lora_up.bias": torch.ones(4)}, "lora_up.bias"),
    "LoHa beside it": (lambda p: {**p, f"{K}.hada_w1_a": torch.ones(4, 2)}, "hada_w1_a"),
    "whole numbers": (lambda p: {**p, UP: p[UP].to(torch.int8)}, "no real numbers"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pair_that_is_not_what_it_seems_is_refused_whole(kind: str, sd1: Base, tmp_path: Path) -> None:
    damage, message = HOSTILE[kind]
    save_file(damage(pair(sd1)), tmp_path / "x.safetensors")
    with pytest.raises((MismatchError, FormatError), match=re.escape(message)):
        bring(tmp_path / "x.safetensors", sd1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


ALONE = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "lokr": ("lokr_w1", "lokr_w2"),
    "full": ("diff",), "oft": ("oft_blocks",), "ia3": ("weight",), "glora": ("a1.weight", "b1.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALONE)
def test_other_kinds_of_adapters_are_of_no_format(kind: str, sd1: Base, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", *(f"{K}.{part}" for part in ALONE[kind]), ALPHA)
    with pytest.raises(FormatError, match="of no format that can be imported"):
        bring(path, sd1)
    with pytest.raises(MismatchError, match="have no place in"):
        bring(path, sd1, form="lora")


WIDE = {
    "no alpha": (lambda p: p, 1.0),
    "alpha as a row": (lambda p: {**p, ALPHA: torch.full((1,), 3.0)}, 1.5),
    "alpha as a whole number": (lambda p: {**p, ALPHA: torch.tensor(3)}, 1.5),
    "past half precision": (lambda p: {UP: p[UP] * 1e9, DOWN: p[DOWN] / 1e9}, 1.0),
    "in eight bits": (lambda p: {key: tensor.to(torch.float8_e4m3fn) for key, tensor in p.items()}, 1.0),
    "in sixty-four bits": (lambda p: {key: tensor.double() for key, tensor in p.items()}, 1.0),
    "as a convolution": (lambda p: {key: tensor[..., None, None] for key, tensor in p.items()}, 1.0),
}


@pytest.mark.parametrize("kind", WIDE)
def test_unusual_pairs_act_as_they_would(kind: str, sd1: Base, tmp_path: Path) -> None:
    change, scale = WIDE[kind]
    tensors = change(pair(sd1))
    save_file(tensors, tmp_path / "x.safetensors")
    added = scale * tensors[UP].float().flatten(1) @ tensors[DOWN].float().flatten(1)
    theirs = noise(sd1, patched(sd1, {f"{LAYER}.weight": added}))
    assert some.far(noise(sd1, edits=bring(tmp_path / "x.safetensors", sd1).edits), theirs) < TOLERANCE


def in_folder(base: Base, folder: Path, config: object) -> Path:
    """PEFT's folder with one layer; `config` as it is where it is bytes."""
    folder.mkdir()
    name = f"base_model.model.{LAYER}"
    save_file({f"{name}.lora_{x}.weight": t for x, t in zip("BA", pair(base).values(), strict=True)},
              folder / "adapter_model.safetensors")  # fmt: skip
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    return folder


CONFIGS = {
    "no JSON": b"{", "no text": b"\xff\xfe", "a list": [], "nested": b"[" * 100_000,
    "text": {"lora_alpha": "x"}, "NaN": b'{"lora_alpha": NaN}', "no table": {"alpha_pattern": [1]},
    "no pattern": {"alpha_pattern": {"(": 1}},
    "residual": {"lora_alpha": 2, "init_lora_weights": "pissa_niter_4"},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_cannot_be_meant(kind: str, sd1: Base, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        bring(in_folder(sd1, tmp_path / "peft", CONFIGS[kind]), sd1, output=tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_alphas_are_found_by_pattern_as_peft_finds_them(sd1: Base, tmp_path: Path) -> None:
    """And what lies beside a file that is not PEFT's is not read."""
    found = in_folder(sd1, tmp_path / "peft", {"lora_alpha": 2, "alpha_pattern": {r"mid_block\..*to_k": 6}})
    (edit,) = bring(found, sd1, output=tmp_path / "a").edits
    save_file(pair(sd1), found / "kohya.safetensors")
    (plain,) = bring(found / "kohya.safetensors", sd1, output=tmp_path / "b").edits
    three, one = (e.tensors["up"].float() @ e.tensors["down"].float() for e in (edit, plain))
    assert some.far(three, 3 * one) < TOLERANCE


def damaged_cpe(base: Base, key: str, tensor: Tensor | None) -> dict[str, Tensor]:
    width = some.width(base)
    start = "attention_gate.encoder_layer.slf_attn."
    tensors = {f"{start}attention_module1.w_qs.weight": torch.ones(1, width, 4),
               f"{start}gate.scaler.weight": torch.ones(1, width, 1), ALPHA: one(1.0)}  # fmt: skip
    out = len(base.unet.get_submodule(LAYER).weight)
    tensors |= {DOWN: torch.ones(1, width, 2), UP: torch.ones(1, 2, out)}
    name = next(name for name in tensors if name.endswith(key))
    return {k: t for k, t in (tensors | {name: tensor}).items() if t is not None}


@pytest.mark.parametrize("tensor", [None, torch.ones(3), one(1.0), torch.ones(2, 3, 4)])
@pytest.mark.parametrize("key", ["w_qs.weight", "scaler.weight", "lora_down.weight", "lora_up.weight"])
def test_a_damaged_cpe_is_refused(key: str, tensor: Tensor | None, sd1: Base, tmp_path: Path) -> None:
    labels = {"prompts": "van gogh", "rank": "2", "alpha": "1.0"}
    save_file(damaged_cpe(sd1, key, tensor), tmp_path / "x.safetensors", labels)
    with pytest.raises(MismatchError, match="have (another shape|no place)"):
        bring(tmp_path / "x.safetensors", sd1, concept="")


@pytest.mark.parametrize("told", ["[1", "[" * 100_000, '{"action": "erase"}', "1, 2", '{"target": null}'])
def test_labels_that_mean_nothing_say_nothing(told: str, sd1: Base, tmp_path: Path) -> None:
    save_file(pair(sd1), tmp_path / "x.safetensors", {"prompts": told})
    with pytest.raises(UsageError, match="does not say which concept it erases|does not know"):
        bring(tmp_path / "x.safetensors", sd1, concept="")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_weights_in_whole_numbers_are_refused(dtype: torch.dtype, sd1: Base, tmp_path: Path) -> None:
    name = next(name for name, _ in layers(sd1, r"attn2\.to_k")) + ".weight"
    shape = sd1.unet.get_parameter(name).shape
    with pytest.raises(FormatError, match="no real numbers"):
        bring(write(tmp_path / "x.safetensors", **{name: torch.ones(shape, dtype=dtype)}), sd1)
