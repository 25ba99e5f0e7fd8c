"""Imports: what an erasure does that was made of somebody else's file is what that file does by itself.

Each file is written by a writer of its own here, or by diffusers and PEFT, and put on a copy of the UNet as
its own program does. TOLERANCE is what the largest difference may be, as a share of the largest noise.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import conceptzap
from conceptzap.base import Base
from conceptzap.base.original import unet_names
from conceptzap.testing import tiny
from conceptzap.training import lessons

TOLERANCE = 1e-3
PROMPTS = [*some.ASKED, *some.OTHER]
LINES = re.compile(r"(up|down)_blocks\.|mid_block\.")


def bring(path: Path, base: Base, concept: str = "van gogh", **more: Any) -> conceptzap.Erasure:
    """The erasure that an import of the file writes, read back."""
    options = {"base": base, "output": path.with_name("ours"), "preview": False, **more}
    return conceptzap.load(conceptzap.import_(path, concept or (), **options).path)


def noise(base: Base, unet: nn.Module | None = None, edits: Any = (), prompts: Any = PROMPTS) -> Tensor:
    whole = base if unet is None else type(base)(**{**vars_of(base), "unet": unet})
    return some.eps(whole, list(prompts), edits)


@cache
def plain(base: Base, prompts: tuple[str, ...]) -> Tensor:
    """The base's own noise, seen once for all files."""
    return noise(base, prompts=prompts)


def vars_of(base: Base) -> dict[str, Any]:
    return {name: getattr(base, name) for name in base.__dataclass_fields__}


def is_same(base: Base, erasure: conceptzap.Erasure, theirs: Tensor, prompts: Any = PROMPTS) -> None:
    assert some.far(noise(base, edits=erasure.edits, prompts=prompts), theirs) < TOLERANCE
    assert some.far(plain(base, tuple(prompts)), theirs) > 10 * TOLERANCE


def layers(base: Base, pattern: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions inside the blocks of the UNet."""
    for name, module in base.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and LINES.match(name) and re.search(pattern, name):
            yield name, module


def factors(module: nn.Module, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, in], with kernels behind at a convolution."""
    out, into, *kernel = module.weight.shape
    up = some.randn(out, rank, *(1 for _ in kernel), seed=seed) / 8
    return up, some.randn(rank, into, *kernel, seed=seed + 1) / (into ** 0.5)


def patched(base: Base, changes: dict[str, Tensor]) -> nn.Module:
    """A copy of the UNet with these changes added to its parameters."""
    unet = copy.deepcopy(base.unet)
    own = dict(unet.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            own[name] += change.view_as(own[name])
    return unet


# LoRA: LECO, kohya's scripts, diffusers, PEFT


def kohya(
    base: Base, path: Path, pattern: str = "", labels: Any = None, alpha: float = 2.0
) -> dict[str, Tensor]:
    """As LECO and kohya's scripts write it; what it adds to each weight comes back."""
    tensors, changes = {}, {}
    for seed, (name, module) in enumerate(layers(base, pattern)):
        up, down = factors(module, 3, 2 * seed)
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        changes[f"{name}.weight"] = alpha / 3 * (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
    save_file(tensors, path, labels)
    return changes


def test_kohyas_own_keys(base: Base, tmp_path: Path) -> None:
    """Every kind of layer, convolutions among them, and an alpha that is not the rank."""
    changes = kohya(base, tmp_path / "theirs.safetensors", "" if base.family == "sd1" else "_block.*0")
    made = bring(tmp_path / "theirs.safetensors", base)
    is_same(base, made, noise(base, patched(base, changes)))
    assert made.header.made[0]["method"] == "lora" and len(made.header.made[0]["imported"]["sha256"]) == 64
    assert made.header.concepts == ("van gogh",) and made.header.base.id == base.id


def peft_keys(name: str, pair: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"base_model.model.{name}.lora_{x}.weight": t for x, t in pair.items()}


def new_keys(name: str, pair: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"unet.{name}.lora_{x}.weight": t for x, t in pair.items()}


def old_keys(name: str, pair: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"unet.{name}.lora.{'up' if x == 'B' else 'down'}.weight": t for x, t in pair.items()}


def oldest_keys(name: str, pair: dict[str, Tensor]) -> dict[str, Tensor]:
    parent, _, last = name.removesuffix(".0").rpartition(".")
    way = {"B": "up", "A": "down"}
    return {f"{parent}.processor.{last}_lora.{way[x]}.weight": t for x, t in pair.items()}


@pytest.mark.parametrize("keys", [peft_keys, new_keys, old_keys, oldest_keys])
def test_keys_of_every_age_of_diffusers(keys: Callable, sd1: Base, tmp_path: Path) -> None:
    tensors, changes = {}, {}
    for seed, (name, module) in enumerate(layers(sd1, r"attn\d\.to_")):
        up, down = factors(module, 2, 2 * seed)
        tensors |= keys(name, {"A": down, "B": up})
        changes[f"{name}.weight"] = up @ down
    save_file(tensors, tmp_path / "theirs.safetensors")
    is_same(sd1, bring(tmp_path / "theirs.safetensors", sd1), noise(sd1, patched(sd1, changes)))


def trained(base: Base) -> Base:
    """The same weights under adapters of PEFT, which do something."""
    from peft import LoraConfig

    other = tiny(base.family)
    other.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_k", "to_v", "ff.net.2"]))
    for seed, (name, value) in enumerate(other.unet.named_parameters()):
        if "lora_" in name:
            value.data.copy_(some.randn(*value.shape, seed=seed) / 8)
    return other


def test_what_diffusers_writes(base: Base, tmp_path: Path) -> None:
    """`save_lora_weights`, whose labels hold the alpha."""
    pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    other = trained(base)
    pipe = type(other.pipeline())
    config = other.unet.peft_config["default"]
    layers_ = {"unet_lora_layers": get_peft_model_state_dict(other.unet)}
    pipe.save_lora_weights(tmp_path, **layers_, unet_lora_adapter_metadata=config.to_dict())
    made = bring(tmp_path / "pytorch_lora_weights.safetensors", base)
    is_same(base, made, noise(base, other.unet))


def test_what_peft_writes(sd1: Base, tmp_path: Path) -> None:
    """A folder, the alpha in the config beside the weights."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(sd1.unet), trained(sd1).unet.peft_config["default"])
    for seed, (name, value) in enumerate(model.named_parameters()):
        if "lora_" in name:
            value.data.copy_(some.randn(*value.shape, seed=seed) / 8)
    model.save_pretrained(str(tmp_path / "peft"))
    made = bring(tmp_path / "peft", sd1, output=tmp_path / "ours")
    is_same(sd1, made, noise(sd1, model.base_model.model))


def test_kohyas_keys_for_sdxl(sdxl: Base, tmp_path: Path) -> None:
    """The original code's paths, which its scripts take there; by diffusers' own table."""
    names = {
        "down_blocks.1.attentions.0": "input_blocks.3.1", "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
    }  # fmt: skip
    tensors, changes = {}, {}
    for seed, (name, module) in enumerate(layers(sdxl, r"attentions.*attn2\.to_[kv]")):
        start = next((one for one in names if name.startswith(one)), None)
        if start:
            up, down = factors(module, 2, 2 * seed)
            key = "lora_unet_" + (names[start] + name.removeprefix(start)).replace(".", "_")
            tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
            changes[f"{name}.weight"] = up @ down
    assert len(changes) > 4
    save_file(tensors, tmp_path / "theirs.safetensors")
    is_same(sdxl, bring(tmp_path / "theirs.safetensors", sdxl), noise(sdxl, patched(sdxl, changes)))


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_text_encoders_go_in(style: str, base: Base, tmp_path: Path) -> None:
    """In all of a family's encoders, by both names; the text is encoded under the edits."""
    tensors, changed = {}, copy.deepcopy(list(base.text_encoders))
    for number, encoder in enumerate(changed):
        for name, module in encoder.named_modules():
            if not name.endswith(("q_proj", "fc1")):
                continue
            up, down = factors(module, 2, len(tensors))
            inner = f"text_model.{name.removeprefix('text_model.')}"
            if style == "kohya":
                start = f"lora_te{number + 1 if base.family == 'sdxl' else ''}_"
                key, parts = start + inner.replace(".", "_"), ("lora_up", "lora_down")
            else:
                key, parts = f"text_encoder{'_2' * number}.{inner}", ("lora_B", "lora_A")
            tensors |= {f"{key}.{part}.weight": t for part, t in zip(parts, (up, down), strict=True)}
            with torch.no_grad():
                module.weight += up @ down
    save_file(tensors, tmp_path / "theirs.safetensors")
    made = bring(tmp_path / "theirs.safetensors", base)
    assert all(site.startswith("text.") for edit in made.edits for site in edit.sites)
    whole = type(base)(**{**vars_of(base), "text_encoders": tuple(changed)})
    is_same(base, made, some.eps(whole, PROMPTS))


def test_leco_says_what_it_erases(sd1: Base, tmp_path: Path) -> None:
    told = [{"target": "cat", "positive": "van gogh", "action": "erase"},
            {"target": "dog", "positive": "dog", "action": "enhance"}]  # fmt: skip
    labels = {"prompts": ",".join(map(json.dumps, told)), "config": "{}"}
    kohya(sd1, tmp_path / "leco.safetensors", r"attn2\.to_k", labels)
    made = conceptzap.import_(tmp_path / "leco.safetensors", base=sd1, output=tmp_path / "x", preview=False)
    assert made.erasure.header.concepts == ("van gogh",) and made.method == "lora"


# SPM and CPE


def test_spm(sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it for the concept, nothing for what must stay, bit for bit."""
    few = [[prompt for prompt in prompts for _ in "ab"] for prompts in (some.ASKED, some.OTHER)]
    monkeypatch.setattr(lessons, "sides", lambda *_: few)  # what random states tell apart
    labels = {"prompts": "van gogh", "rank": "1", "alpha": "1.0"}
    changes = kohya(sd1, tmp_path / "spm.safetensors", "attentions", labels)
    made = bring(tmp_path / "spm.safetensors", sd1, concept="")
    assert made.header.concepts == ("van gogh",) and made.header.made[0]["method"] == "spm"
    is_same(sd1, made, noise(sd1, patched(sd1, changes), prompts=some.ASKED), some.ASKED)
    shut = list(some.OTHER)
    assert noise(sd1, edits=made.edits, prompts=shut).equal(noise(sd1, prompts=shut))
    plain = bring(tmp_path / "spm.safetensors", sd1, form="lora", force=True)
    is_same(sd1, plain, noise(sd1, patched(sd1, changes)))


class Gated(nn.Module):
    """A layer with the residual attention gate of CPE around it, as its paper has it for one concept."""

    def __init__(self, layer: nn.Module, query: Tensor, scaler: Tensor, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.layer, self.parts = layer, (query, scaler, down, up)

    def forward(self, x: Tensor) -> Tensor:
        query, scaler, down, up = self.parts
        asked = torch.einsum("btd,ndh->bnth", x, query)
        attention = (asked @ asked.transpose(-1, -2)).softmax(-1)
        told = torch.einsum("bnst,btd->bnsd", attention, x)
        open_ = torch.sigmoid(torch.einsum("ndi,bntd->bnti", scaler, told))
        direction = (open_ * told).sum(1)
        return self.layer(x) + direction @ down[0] @ up[0] * 0.5


def test_cpe(base: Base, tmp_path: Path) -> None:
    width, unet = some.width(base), copy.deepcopy(base.unet)
    start = "attention_gate.encoder_layer.slf_attn."
    query, scaler = some.randn(1, width, 4), some.randn(1, width, 1, seed=1) / 4
    tensors = {f"{start}attention_module1.w_qs.weight": query, f"{start}gate.scaler.weight": scaler,
               f"{start}attention_module1.w_ks.weight": some.randn(1, width, 4, seed=2)}  # fmt: skip
    for seed, (name, module) in enumerate(layers(base, r"attn2\.to_[kv]")):
        down = some.randn(1, width, 2, seed=10 + seed) / 4
        up = some.randn(1, 2, len(module.weight), seed=99 + seed)
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
        parent, _, last = name.rpartition(".")
        setattr(unet.get_submodule(parent), last, Gated(module, query, scaler, down, up))
    save_file(tensors, tmp_path / "cpe.safetensors", {"prompts": "van gogh", "rank": "2", "alpha": "1.0"})
    made = bring(tmp_path / "cpe.safetensors", base, concept="")
    assert made.header.made[0]["method"] == "cpe"
    is_same(base, made, noise(base, unet))


# UCE and ESD


def closed_form(base: Base) -> dict[str, Tensor]:
    """Eq. 7 of UCE for one concept, layer by layer: what its script writes."""
    with torch.no_grad():
        text = base.encode(["van gogh", "painting", *some.OTHER]).states.float()  # [n, length, width]
        concept, anchor, keep = text[0, 1:3], text[1, 1:3], text[2:, 1:6].flatten(0, 1)
        found = {}
        for name, module in layers(base, r"attn2\.to_[kv]"):
            old = module.weight.float()
            one = (anchor @ old.T).T @ concept + (keep @ old.T).T @ keep + 0.5 * old
            two = concept.T @ concept + keep.T @ keep + 0.5 * torch.eye(old.shape[1])
            found[f"{name}.weight"] = (one @ torch.inverse(two)).contiguous()
    return found


def loaded(base: Base, weights: dict[str, Tensor]) -> nn.Module:
    unet = copy.deepcopy(base.unet)
    assert not unet.load_state_dict(weights, strict=False).unexpected_keys
    return unet


def test_uce(base: Base, tmp_path: Path) -> None:
    """One pair of vectors a token for all layers, found again in what it made of them."""
    weights = closed_form(base)
    save_file(weights, tmp_path / "uce.safetensors")
    made = bring(tmp_path / "uce.safetensors", base)
    is_same(base, made, noise(base, loaded(base, weights)))
    (edit,) = made.edits
    assert set(edit.tensors) == {"into", "down"} and len(edit.tensors["down"]) <= 2
    assert len(edit.sites) == len(weights)


def test_uce_in_half_precision(sd1: Base, tmp_path: Path) -> None:
    """What rounding adds to every weight is no change, where the layer has no other."""
    weights = {name: weight.half() for name, weight in closed_form(sd1).items()}
    first = next(iter(weights))
    weights[first] = dict(sd1.unet.named_parameters())[first].half()
    save_file(weights, tmp_path / "uce.safetensors")
    made = bring(tmp_path / "uce.safetensors", sd1)
    is_same(sd1, made, noise(sd1, loaded(sd1, {name: weight.float() for name, weight in weights.items()})))
    assert f"unet.{first.removesuffix('.weight')}" not in {s for edit in made.edits for s in edit.sites}


@pytest.mark.parametrize("which", [r"attn2\.", r"attn2\.to_[kv]", ""])
def test_esd(which: str, base: Base, tmp_path: Path) -> None:
    """ESD-x, its strict form, and all layers: weights, biases, convolutions."""
    own = dict(base.unet.named_parameters())
    weights = {
        f"{name}.{kind}": own[f"{name}.{kind}"] + some.randn(*own[f"{name}.{kind}"].shape, seed=seed) / 40
        for seed, (name, module) in enumerate(layers(base, which))
        for kind, value in module.named_parameters() if value is not None
    }  # fmt: skip
    if not which:  # a whole UNet, of which most is as it was
        weights = {name: value.clone() for name, value in own.items()} | weights
    save_file(weights, tmp_path / "esd.safetensors")
    is_same(base, bring(tmp_path / "esd.safetensors", base), noise(base, loaded(base, weights)))


def test_a_whole_unet_by_its_original_names(sd1: Base, tmp_path: Path) -> None:
    own, names = dict(sd1.unet.named_parameters()), unet_names(sd1.unet)
    site = next(name for name, _ in layers(sd1, r"attn2\.to_k"))
    weights = {name: value.clone() for name, value in own.items()}
    weights[f"{site}.weight"] += some.randn(*own[f"{site}.weight"].shape) / 8
    renamed = {f"model.diffusion_model.{names[name]}": value for name, value in weights.items()}
    save_file(renamed, tmp_path / "esd.safetensors")
    made = bring(tmp_path / "esd.safetensors", sd1)
    assert [edit.sites for edit in made.edits] == [(f"unet.{site}",)]
    assert some.far(noise(sd1, edits=made.edits), noise(sd1, loaded(sd1, weights))) < TOLERANCE
