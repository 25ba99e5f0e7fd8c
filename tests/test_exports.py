"""Exports: what plain diffusers makes of them is what the attached edits do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    UNet2DConditionModel,
)
from exported import (
    CLOSE,
    FORMATS,
    Heard,
    bytes_of,
    is_exported,
    named,
    save,
    seen,
    through_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file

import conceptzap
from conceptzap import format
from conceptzap.base import Base, names, original, parameters, single_file
from conceptzap.errors import RefusedError
from conceptzap.exports import lora
from conceptzap.training.closed_form import POOLED_SITE

# what is exported is what is attached


@pytest.mark.parametrize("to", FORMATS)
def test_plain_diffusers_reproduces_every_module(to: str, base: Base, tmp_path: Path) -> None:
    """Keys and values by one shared pair, and every other place by factors of its own."""
    edits = [some.shared(base), *(some.low_rank(base, path, seed=i) for i, path in enumerate(named(base)))]
    kinds = {path.rpartition(".")[2] for path in named(base)}
    assert {"to_q", "to_k", "to_v", "0", "2", "proj", "proj_in", "proj_out"} < kinds
    assert {"conv1", "conv2", "conv_shortcut", "time_emb_proj"} < kinds
    made = conceptzap.export(save(tmp_path, base, "a", edits), to, tmp_path / "out", base=base)
    assert made.facts["dtype"] == "float32" and made.facts["relative_error"] < CLOSE
    is_exported(base, made.path, edits)


@pytest.mark.parametrize("to", FORMATS)
def test_several_files_go_in_at_their_strengths(to: str, base: Base, tmp_path: Path) -> None:
    """One module gets three ranks from two files; the order of files makes no difference."""
    first, second = [some.shared(base, r=3)], [some.shared(base, seed=9), some.low_rank(base)]
    a, b = save(tmp_path, base, "a", first), save(tmp_path, base, "b", second)
    pairs = [(a, 0.5), (b, 1.5)]
    made = conceptzap.export(pairs, to, tmp_path / "out", base=base)
    is_exported(base, made.path, [*(e.scaled(0.5) for e in first), *(e.scaled(1.5) for e in second)])
    assert {(one["digest"], one["strength"]) for one in made.erasures} == {
        (format.read_header(path).digest, strength) for path, strength in pairs
    }
    again = conceptzap.export(pairs[::-1], to, tmp_path / "again", base=base)
    assert all(bytes_of(made.path)[name] == data for name, data in bytes_of(again.path).items())


@pytest.mark.parametrize("make", [some.delta, some.mask])
@pytest.mark.parametrize("pattern", [some.FEED, some.CONVS])
def test_dense_changes_of_full_rank(make: Any, pattern: str, base: Base, tmp_path: Path) -> None:
    edits = [make(base, pattern), some.low_rank(base, pattern), some.shared(base)]
    path = save(tmp_path, base, "a", edits)
    heard = Heard()
    made = conceptzap.export(path, "lora", tmp_path / "out", base=base, rank=999, report=heard)
    assert heard.warnings and made.facts["relative_error"] < CLOSE
    is_exported(base, made.path, edits)
    whole = conceptzap.export(path, "checkpoint", tmp_path / "folder", base=base)
    is_exported(base, whole.path, edits)


def test_a_rank_that_loses_says_how_much(sd1: Base, tmp_path: Path) -> None:
    """The best of its rank, by the size of what is left out."""
    edit = some.delta(sd1)
    heard = Heard()
    path = save(tmp_path, sd1, "a", [edit])
    made = conceptzap.export(path, "lora", tmp_path / "out", base=sd1, rank=2, report=heard)
    sizes = torch.linalg.svdvals(edit.tensors["delta"])
    left_out = (sizes[2:].norm() / sizes.norm()).item()
    assert made.facts["relative_error"] == pytest.approx(left_out, rel=0.01) and left_out > 0.5
    (warning,) = heard.warnings
    assert str(made.facts["relative_error"]) in warning
    missing = some.far(seen(through_diffusers(sd1, made.path)), seen(sd1, [edit]))
    assert CLOSE < missing < some.far(seen(sd1), seen(sd1, [edit]))


def test_half_precision_factors_are_kept_bit_for_bit(sd1: Base, tmp_path: Path) -> None:
    """As erasures store them: the LoRA holds the same bits, and one rank and alpha for all modules."""
    wide, narrow = some.low_rank(sd1, some.CONVS), some.low_rank(sd1)
    wide = replace(wide, tensors={k: torch.cat([v, v], int(k == "up")) for k, v in wide.tensors.items()})
    edits = [
        replace(edit, tensors={slot: value.half() for slot, value in edit.tensors.items()})
        for edit in (wide, narrow)
    ]
    made = conceptzap.export(save(tmp_path, sd1, "a", edits), "lora", tmp_path / "out", base=sd1)
    assert made.facts["dtype"] == "float16"
    stored = load_file(made.path)
    for edit in edits:
        name = "lora_unet_" + edit.sites[0].removeprefix("unet.").replace(".", "_")
        up, down = stored[f"{name}.lora_up.weight"], stored[f"{name}.lora_down.weight"]
        rank = edit.tensors["down"].shape[0]
        assert up[:, :rank].equal(edit.tensors["up"]) and not up[:, rank:].any()
        assert down[:rank].equal(edit.tensors["down"]) and not down[rank:].any()
        assert len(down) == stored[f"{name}.alpha"].item() == made.facts["rank"] == 4
    is_exported(sd1, made.path, edits, within=1e-3)


def test_programs_can_tell_what_a_lora_is(base: Base, tmp_path: Path) -> None:
    made = conceptzap.export(save(tmp_path, base, "a", [some.shared(base)]), "lora", tmp_path / "out", base=base)
    with safe_open(made.path, "pt") as file:
        labels = file.metadata()
        assert all(key.startswith("lora_unet_") for key in file.keys())
    assert labels["modelspec.architecture"].endswith("/lora")
    assert labels["ss_network_module"] == "networks.lora" and labels["ss_output_name"] == "Van Gogh"
    assert labels["ss_v2"] == str(base.family == "sd2")
    assert labels["ss_base_model_version"].startswith("sdxl_") == (base.family == "sdxl")
    origin = json.loads(labels["conceptzap"])
    assert origin["base"]["signature"] == base.signature
    assert [one["digest"] for one in origin["erasures"]] == [made.erasures[0]["digest"]]


RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
          "conv_shortcut": "skip_connection"}  # fmt: skip


def webui(key: str) -> str:
    """The original name that AUTOMATIC1111's webui makes of a kohya key: a level has three rows."""
    found = re.fullmatch(r"lora_unet_(down|up|mid)_blocks?_(?:(\d)_)?(attentions|resnets)_(\d)_(.+)", key)
    way, level, kind, layer, inside = found.groups()
    column, inside = (1, inside) if kind == "attentions" else (0, RESNET[inside])
    if way == "mid":
        return f"middle_block_{1 if column else 2 * int(layer)}_{inside}"
    row = 3 * int(level) + int(layer)
    return f"{f'input_blocks_{row + 1}' if way == 'down' else f'output_blocks_{row}'}_{column}_{inside}"


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_webui_finds_every_module_of_a_real_unet(name: str) -> None:
    """By its rule, which is written for the published shapes, from the key that the file has."""
    config = Path(single_file.__file__).parent / "configs" / name / "unet"
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(config)))
    paths = [path for path, _ in parameters(unet) if path.endswith(".weight")]
    originals = [path for path in original.unet_names(unet).values() if path.endswith(".weight")]
    found = 0
    for path, there in zip(paths, originals, strict=True):
        module = path.removesuffix(".weight")
        if lora.NAMED.fullmatch(f"unet.{module}") and not re.search(r"norm\d?$", module):
            assert webui(names.underscored(f"unet.{module}")) == there.removesuffix(".weight").replace(".", "_")
            found += 1
    assert found > 200


@pytest.mark.parametrize("to", FORMATS)
def test_plain_diffusers_reads_texts_as_the_erased_encoders_do(
    to: str, base: Base, tmp_path: Path
) -> None:
    """Every linear layer of them that programs agree on a name for, beside one in the UNet."""
    sites = [s for s in base.sites("text.*.layers.*") if isinstance(base.module(s), torch.nn.Linear)]
    edits = [some.shared(base), *(some.in_text(base, site, seed=i) for i, site in enumerate(sites))]
    path = save(tmp_path, base, "a", edits)
    made = conceptzap.export(path, to, tmp_path / "out", base=base)
    is_exported(base, made.path, edits)
    if to == "lora":
        other = conceptzap.export(path, to, tmp_path / "diffusers", base=base, keys="diffusers")
        is_exported(base, other.path, edits)
        with pytest.raises(RefusedError, match="PEFT folder cannot hold"):
            conceptzap.export(path, to, tmp_path / "peft", base=base, keys="peft")
        names = {name.split(".")[0] for name in load_file(made.path)}
        numbers = ("te1", "te2") if base.family == "sdxl" else ("te",)
        first = {f"lora_{n}_text_model_encoder_layers_0_self_attn_q_proj" for n in numbers}
        assert first <= names and len(names) == len(sites) + len(edits[0].sites)


def test_words_go_into_a_checkpoint_and_into_no_lora(base: Base, tmp_path: Path) -> None:
    edits = [some.in_text(base, some.TABLE), some.in_text(base, form="delta"), some.low_rank(base)]
    path = save(tmp_path, base, "a", edits)
    made = conceptzap.export(path, "checkpoint", tmp_path / "out", base=base)
    is_exported(base, made.path, edits)
    with pytest.raises(RefusedError, match="no two programs agree on a name for text"):
        conceptzap.export(path, "lora", tmp_path / "lora", base=base, rank=4)


def test_the_pooled_text_goes_into_a_checkpoint_and_into_no_lora(sdxl: Base, tmp_path: Path) -> None:
    """A LoRA that left it out would keep the larger half of the concept."""
    edits = [some.shared(sdxl), some.low_rank(sdxl, POOLED_SITE)]
    path = save(tmp_path, sdxl, "a", edits)
    with pytest.raises(RefusedError, match="a lora cannot hold 1 of 2 edits") as caught:
        conceptzap.export(path, "lora", tmp_path / "out", base=sdxl)
    assert f"agree on a name for {POOLED_SITE}; use --to checkpoint" in caught.value.hint
    is_exported(sdxl, conceptzap.export(path, "checkpoint", tmp_path / "out", base=sdxl).path, edits)
