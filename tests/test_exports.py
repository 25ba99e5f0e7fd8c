"""Exports: what plain diffusers makes of them is what the attached edits do, or nothing is written."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import edits as some
import erasures
import pytest
import torch
from accelerate import init_empty_weights
from command import conceptzap as program
from command import contents, refused
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from samples import header
from samples import small as sample
from test_cli_bad_input import read_only

import conceptzap
from conceptzap import format
from conceptzap.base import Base, load_base, original, parameters, single_file
from conceptzap.edit import Edit
from conceptzap.errors import RefusedError, ResourceError, UsageError
from conceptzap.exports import checkpoint, lora
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.testing import save_tiny, tiny
from conceptzap.training.closed_form import POOLED_SITE

SUFFIX = ".lprompt.safetensors"
FORMATS = list(family.members("exports"))
PROMPTS = [*some.ASKED, *some.OTHER]
CLOSE = 1e-5


class Heard(Report):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def named(base: Base) -> list[str]:
    """Every Linear and convolution of the UNet that a LoRA has a name for."""
    modules = base.unet.named_modules()
    paths = [f"unet.{name}" for name, m in modules if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    return [path for path in paths if lora.NAMED.fullmatch(path)]


def save(folder: Path, base: Base, name: str, edits: Sequence[Edit]) -> Path:
    path = folder / f"{name}{SUFFIX}"
    format.save(some.erasure(base, edits), path)
    return path


def through_diffusers(base: Base, written: Path) -> Base:
    """A base of the same weights, or of none, on which diffusers alone puts what was written."""
    if written.is_dir():
        return replace(base, unet=DiffusionPipeline.from_pretrained(str(written)).unet.eval())
    pipe = tiny(base.family).pipeline()
    pipe.load_lora_weights(str(written))
    return replace(base, unet=pipe.unet)


def seen(base: Base, edits: Sequence[Edit] = ()) -> torch.Tensor:
    return some.eps(base, PROMPTS, edits)


def is_exported(base: Base, written: Path, edits: Sequence[Edit], within: float = CLOSE) -> None:
    """Plain diffusers sees the noise of the attached edits, which is far from the base's."""
    wanted = seen(base, edits)
    assert some.far(seen(through_diffusers(base, written)), wanted) < within
    assert some.far(seen(base), wanted) > 30 * within


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
    assert all(_bytes(made.path)[name] == data for name, data in _bytes(again.path).items())


def _bytes(path: Path) -> dict[str, bytes]:
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


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
    originals = [path for path in original._unet(unet) if path.endswith(".weight")]
    found = 0
    for path, there in zip(paths, originals, strict=True):
        module = path.removesuffix(".weight")
        if lora.NAMED.fullmatch(f"unet.{module}") and not re.search(r"norm\d?$", module):
            assert webui(lora.key(f"unet.{module}")) == there.removesuffix(".weight").replace(".", "_")
            found += 1
    assert found > 200


def test_the_pooled_text_goes_into_a_checkpoint_and_into_no_lora(sdxl: Base, tmp_path: Path) -> None:
    """A LoRA that left it out would keep the larger half of the concept."""
    edits = [some.shared(sdxl), some.low_rank(sdxl, POOLED_SITE)]
    path = save(tmp_path, sdxl, "a", edits)
    with pytest.raises(RefusedError, match="a lora cannot hold 1 of 2 edits") as caught:
        conceptzap.export(path, "lora", tmp_path / "out", base=sdxl)
    assert f"agree on a name for {POOLED_SITE}; use --to checkpoint" in caught.value.hint
    is_exported(sdxl, conceptzap.export(path, "checkpoint", tmp_path / "out", base=sdxl).path, edits)


# the folder


def halved(folder: Path) -> Path:
    """A checkpoint that is stored in half precision."""
    source = tiny("sd1")
    pipe = source.pipeline().to(torch.float16)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return folder


def test_a_folder_is_a_whole_checkpoint_in_the_dtype_of_its_base(tmp_path: Path) -> None:
    folder = halved(tmp_path / "base")
    here = load_base(str(folder), "cpu")
    edits = [some.low_rank(here), some.shared(here)]
    path = save(tmp_path, here, "a", edits)
    made = conceptzap.export(path, "checkpoint", tmp_path / "out", base=str(folder))
    assert made.facts["dtype"] == "float16"
    is_exported(here, made.path, edits, within=2e-3)
    touched = {f"{site.removeprefix('unet.')}.weight" for edit in edits for site in edit.sites}
    for part in ("unet", "vae", "text_encoder"):
        (before,), (after,) = (list((at / part).glob("*.safetensors")) for at in (folder, made.path))
        was, now = load_file(before), load_file(after)
        changed = {name for name in was if not now[name].equal(was[name])}
        assert was.keys() == now.keys() and changed == (touched if part == "unet" else set())
    assert {p.suffix for p in made.path.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".txt"}
    pipe = DiffusionPipeline.from_pretrained(str(made.path))
    drawn = pipe("a photo of a cat", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 16, 16, 3)
    half = DiffusionPipeline.from_pretrained(str(made.path), torch_dtype=torch.float16)
    assert half.unet.dtype == half.text_encoder.dtype == half.vae.dtype == torch.float16
    assert load_base(str(made.path), "cpu").signature == here.signature


def test_a_folder_says_what_went_in(base: Base, tmp_path: Path) -> None:
    """Beside the index and in the UNet's config, which stays when that is saved again; no paths."""
    path = save(tmp_path, base, "a", [some.shared(base)])
    folder = save_tiny(tmp_path / "base", base.family)
    made = conceptzap.export(path, "checkpoint", tmp_path / "out", base=str(folder))
    digest = format.read_header(path).digest
    note = json.loads((made.path / "conceptzap.json").read_text())
    assert note["schema"] == "conceptzap.baked/1" and note["concepts"] == ["van gogh"]
    assert note["erasures"] == [{"title": "Van Gogh", "digest": digest, "strength": 1.0}]
    assert note["base"]["fingerprint"] == base.fingerprint([])
    pipe = DiffusionPipeline.from_pretrained(str(made.path))
    pipe.save_pretrained(str(tmp_path / "again"))
    for place in (made.path, tmp_path / "again"):
        assert json.loads((place / "unet/config.json").read_text())["_conceptzap"] == {"erasures": [digest]}
    texts = [one.read_text() for one in made.path.rglob("*.json")]
    assert not any(str(tmp_path) in text for text in texts)
    modes = {one.stat().st_mode & 0o777 for one in made.path.rglob("*") if one.is_file()}
    assert modes == {(tmp_path / "base/model_index.json").stat().st_mode & 0o777}
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def published(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """A base with CLIP's own words, and its configs as those by which single files are read."""
    found = tiny(base.family, clip=True)
    found.pipeline().save_pretrained(str(tmp_path / "configs" / base.family))
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(single_file, "V_SIZE", 8)
    return found


def test_one_file_is_the_whole_checkpoint(published: Base, tmp_path: Path) -> None:
    """Under the original names, every bit of it, and diffusers reads it as we do."""
    edits = [some.low_rank(published), some.shared(published)]
    path, target = save(tmp_path, published, "a", edits), tmp_path / "out.safetensors"
    made = conceptzap.export(path, "checkpoint", target, base=published)
    assert made.path == target and made.facts["dtype"] == "float32"
    kind = StableDiffusionXLPipeline if published.family == "sdxl" else StableDiffusionPipeline
    pipe = kind.from_single_file(
        str(target), config=str(single_file.CONFIGS / published.family), local_files_only=True
    )
    theirs = replace(published, unet=pipe.unet.eval())
    assert some.far(seen(theirs), seen(published, edits)) < CLOSE
    again = load_base(str(target), "cpu")
    assert (again.family, again.prediction) == (published.family, published.prediction)
    touched = {f"{site.removeprefix('unet.')}.weight" for edit in edits for site in edit.sites}
    pairs = zip(
        (published.unet, published.vae, *published.text_encoders),
        (again.unet, again.vae, *again.text_encoders),
        strict=True,
    )
    for number, (was, now) in enumerate(pairs):
        was, now = dict(parameters(was)), dict(parameters(now))
        changed = {name for name in was if not now[name].equal(was[name])}
        assert was.keys() == now.keys() and changed == (set() if number else touched)
    with safe_open(target, "pt") as file:
        said = file.metadata()
    assert json.loads(said["conceptzap"])["concepts"] == ["van gogh"]
    assert str(tmp_path) not in str(said) and "from_single_file" in made.use
    assert target.stat().st_mode & 0o777 == path.stat().st_mode & 0o777
    with pytest.raises(UsageError, match="exists"):
        conceptzap.export(path, "checkpoint", target, base=published)
    conceptzap.export(path, "checkpoint", target, base=published, force=True, dtype="float16")
    assert not list(tmp_path.glob(".*"))


def test_one_file_of_what_it_cannot_hold_is_refused(
    sd1: Base, published: Base, tmp_path: Path
) -> None:
    """A tokenizer, and another schedule than the family's; a folder holds both."""
    target = tmp_path / "out.safetensors"
    with pytest.raises(RefusedError, match="no tokenizer") as caught:
        conceptzap.export(some.erasure(sd1, [some.shared(sd1)]), "checkpoint", target, base=sd1)
    assert "folder" in caught.value.hint
    other = replace(published, scheduler_config=published.scheduler_config | {"beta_end": 0.02})
    value = some.erasure(other, [some.shared(other)])
    with pytest.raises(RefusedError, match="noise schedule"):
        conceptzap.export(value, "checkpoint", target, base=other)
    with pytest.raises(UsageError, match="an erasure is called"):
        conceptzap.export(value, "checkpoint", tmp_path / "x.lprompt.safetensors", base=other)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_the_base_stays_as_it_is(sd1: Base, tmp_path: Path) -> None:
    before, hooks = seen(sd1), some.hooks(sd1)
    for to in FORMATS:
        conceptzap.export(some.erasure(sd1, [some.shared(sd1)]), to, tmp_path / to, base=sd1, dtype="float16")
    assert seen(sd1).equal(before) and some.hooks(sd1) == hooks
    assert sd1.unet.dtype == sd1.vae.dtype == torch.float32 and "_conceptzap" not in sd1.unet.config


def test_what_rounding_takes_away_is_not_written(sd1: Base, tmp_path: Path) -> None:
    """A change below the steps of half precision would leave a checkpoint that is not erased."""
    unseen = {"checkpoint": (1e-6, "acts otherwise"), "lora": (1e-9, "is lost in float16")}
    for to, (size, message) in unseen.items():
        faint = erasures.nudge(sd1, "cat", size=size)
        with pytest.raises(RefusedError, match=message) as caught:
            conceptzap.export(faint, to, tmp_path / to, base=sd1, dtype="float16")
        assert "float32" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoilt", ["half", "forgotten"])
def test_a_checkpoint_that_does_not_erase_is_not_left_behind(
    spoilt: str, sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bake = checkpoint.bake
    wrong = {
        "half": lambda unet, edits: bake(unet, [edit.scaled(0.5) for edit in edits]),
        "forgotten": lambda unet, edits: bake(unet, edits[1:]),
    }
    path = save(tmp_path, sd1, "a", [some.low_rank(sd1), some.shared(sd1)])
    conceptzap.export(path, "checkpoint", tmp_path / "out", base=sd1)
    before = contents(tmp_path)
    monkeypatch.setattr(checkpoint, "bake", wrong[spoilt])
    with pytest.raises(RefusedError, match="acts otherwise than attached"):
        conceptzap.export(path, "checkpoint", tmp_path / "out", base=sd1, force=True)
    assert contents(tmp_path) == before


def test_force_replaces_what_an_export_wrote_and_nothing_else(sd1: Base, tmp_path: Path) -> None:
    first, second = [some.shared(sd1)], [some.shared(sd1, seed=5)]
    target = tmp_path / "out"
    conceptzap.export(save(tmp_path, sd1, "a", first), "checkpoint", target, base=sd1)
    link = tmp_path / "link"
    link.symlink_to(target)
    path = save(tmp_path, sd1, "b", second)
    with pytest.raises(UsageError, match="exists"):
        conceptzap.export(path, "checkpoint", link, base=sd1)
    made = conceptzap.export(path, "checkpoint", link, base=sd1, force=True)
    assert link.is_symlink() and made.path == target
    is_exported(sd1, target, second)
    mine = save_tiny(tmp_path / "mine")
    before = contents(mine)
    with pytest.raises(UsageError, match="was not written by export"):
        conceptzap.export(path, "checkpoint", mine, base=sd1, force=True)
    assert contents(mine) == before and not list(tmp_path.glob(".*"))


def test_what_a_killed_export_left_is_cleared_away(sd1: Base, tmp_path: Path) -> None:
    left = tmp_path / ".out.tmp"
    (left / "unet").mkdir(parents=True)
    (left / "unet" / "half.safetensors").write_bytes(b"torn")
    (left / "link").symlink_to(tmp_path)
    path = save(tmp_path, sd1, "a", [some.shared(sd1)])
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ResourceError, match="another run is writing"):
        conceptzap.export(path, "checkpoint", tmp_path / "out", base=sd1)
    assert (left / "unet" / "half.safetensors").exists()
    os.close(handle)
    made = conceptzap.export(path, "checkpoint", tmp_path / "out", base=sd1)
    assert not left.exists() and path.exists()
    assert not (made.path / "link").exists() and not (made.path / "unet/half.safetensors").exists()


def test_a_rename_that_fails_puts_back_what_stood_there(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    path = save(tmp_path, sd1, "a", [some.shared(sd1)])
    conceptzap.export(path, "checkpoint", target, base=sd1)
    before, rename = contents(tmp_path), Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name == ".out.tmp":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match="Input/output error"):
        conceptzap.export(path, "checkpoint", target, base=sd1, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_full_disk_leaves_nothing(
    moment: str, sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, sd1, "a", [some.shared(sd1)])
    before = contents(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if moment == "before":
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**5}))
    else:
        monkeypatch.setattr("diffusers.AutoencoderKL.save_pretrained", full)
    with pytest.raises(ResourceError, match="[Nn]o space"):
        conceptzap.export(path, "checkpoint", tmp_path / "out", base=sd1)
    assert contents(tmp_path) == before


# what cannot be exported


def misfits(base: Base) -> dict[str, tuple[str, list[Edit]]]:
    gate, weight = some.gate(base), some.low_rank(base)
    many = len(base.sites("unet.*.attn2"))
    return {
        "gated": (f"1 of 2 edits: weight (down, into) at {2 * many} modules behind 1 gate",
                  [some.shared(base, gates=[gate]), weight]),
        "window": ("1 of 1 edit: weight (down, up) at 1 module behind 1 gate",
                   [some.low_rank(base, gates=[some.window(0, 999)])]),
        "tokens": (f"1 of 2 edits: tokens at {many} modules", [some.tokens(base), weight]),
        "rows": ("tokens at 1 module", [some.key_values(base)]),
        "adapter": ("1 of 2 edits: adapter at 1 module", [some.adapter(base), weight]),
        "default": (f"2 of 2 edits: tokens at {many} modules behind 1 gate; weight (down, into)",
                    list(some.eraser(base))),
    }  # fmt: skip


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["gated", "window", "tokens", "rows", "adapter", "default"])
def test_half_an_erasure_is_never_exported(kind: str, to: str, sd1: Base, tmp_path: Path) -> None:
    """The one line lists what does not fit and says what to do; no base is loaded for it."""
    message, edits = misfits(sd1)[kind]
    path = save(tmp_path, sd1, "a", edits)
    words = ["export", path, "--to", to, "-o", tmp_path / "out", "--base", "./nowhere"]
    refused(tmp_path, 6, message, *words)
    assert "load it with conceptzap" in program(*words).err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and erasures, sound and unfit ones."""
    folder, base = tmp_path_factory.mktemp("exports"), tiny("sd1")
    save_tiny(folder / "base")
    save_tiny(folder / "sd2", "sd2")
    files = {
        "good": [some.low_rank(base)],
        "dense": [some.delta(base), some.mask(base, some.CONVS), some.shared(base)],
        "nameless": [some.low_rank(base, "unet.conv_in"), some.low_rank(base)],
        "sampler": [some.low_rank(base, "unet.*samplers.0.conv")],
    }
    for name, edits in files.items():
        save(folder, base, name, edits)
    for role in ("key", "attack"):
        save(folder, base, role, [replace(some.low_rank(base), role=role), some.shared(base)])
    elsewhere = replace(sample(), header=header(title="elsewhere"))
    format.save(elsewhere, folder / f"elsewhere{SUFFIX}")
    (folder / "there.safetensors").write_bytes(b"mine")
    (folder / "there").mkdir()
    (folder / "there" / "mine.txt").write_text("mine")
    return folder


LORA, CHECKPOINT = ("--to", "lora"), ("--to", "checkpoint")
OUT = ("-o", "new")
BAD = [
    (2, "no export is called 'loar'", "good", "--to", "loar", *OUT),
    (2, "--to", "good", *OUT),
    (2, "--output", "good", *LORA),
    (2, "strength 3", "good:3", *LORA, *OUT),
    (2, "at strength 0 is absent", "good:0", *LORA, *OUT),
    (2, "exists", "good", *LORA, "-o", "there.safetensors"),
    (2, "is a folder", "good", *LORA, "-o", "there"),
    (2, "is what an erasure is called", "good", *LORA, "-o", f"new{SUFFIX}"),
    (2, "no folder", "good", *LORA, "-o", "nowhere/new"),
    (2, "no folder", "good", *CHECKPOINT, "-o", "nowhere/new"),
    (2, "exists", "good", *CHECKPOINT, "-o", "there"),
    (2, "was not written by export", "good", *CHECKPOINT, "-o", "there", "--force"),
    (2, "was not written by export", "good", *CHECKPOINT, "-o", "base", "--base", "base", "--force"),
    (2, "is not a folder", "good", *CHECKPOINT, "-o", "base/model_index.json", "--force"),
    (6, "words of its own", "good", *CHECKPOINT, "-o", "there.safetensors", "--force"),
    (2, "--rank 0", "dense", *LORA, *OUT, "--rank", "0"),
    (2, "--rank", "good", *LORA, *OUT, "--rank", "many"),
    (2, "no --rank", "good", *CHECKPOINT, *OUT, "--rank", "4"),
    (2, "--dtype 'int8'", "good", *LORA, *OUT, "--dtype", "int8"),
    (2, "--dtype 'bfloat16'", "good", *LORA, *OUT, "--dtype", "bfloat16"),
    (2, "--dtype 'int8'", "good", *CHECKPOINT, *OUT, "--dtype", "int8"),
    (2, "--prediction", "good", *LORA, *OUT, "--prediction", "x"),
    (3, "no such file", "nowhere", *LORA, *OUT),
    (4, "another architecture", "good", *LORA, *OUT, "--base", "sd2"),
    (4, "cannot stack", "good", f"elsewhere{SUFFIX}", *LORA, *OUT),
    (5, "there is no checkpoint", "good", *CHECKPOINT, *OUT, "--base", "./nothing"),
    (6, "2 of 3 edits: weight (delta) at 1 module; weight (keep) at 1 module", "dense", *LORA, *OUT),
    (6, "1 of 2 edits: weight (down, up) at 1 module", "nameless", *LORA, *OUT),
    (6, "1 of 1 edit: weight (down, up) at 1 module", "sampler", *LORA, *OUT),
    (6, "the role key", "key", *LORA, *OUT),
    (6, "the role key", "good", f"key{SUFFIX}", *CHECKPOINT, *OUT),
    (6, "the role attack", "attack", *CHECKPOINT, *OUT),
]


@pytest.mark.parametrize(("code", "message", "words"), [(c, m, w) for c, m, *w in BAD])
def test_bad_input(
    code: int, message: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    name, colon, strength = words[0].partition(":")
    base = [] if "--base" in words else ["--base", "base"]
    refused(made, code, message, "export", f"{name}{SUFFIX}{colon}{strength}", *words[1:], *base)


@pytest.mark.parametrize("to", FORMATS)
def test_a_read_only_folder_is_noticed_before_any_work(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("conceptzap.base.load_base", work)
    with read_only() as folder:
        monkeypatch.chdir(folder)
        refused(folder, 5, "cannot write in", "export", f"good{SUFFIX}", "--to", to, "-o", "new")
        monkeypatch.undo()


# the command


@pytest.mark.parametrize("to", FORMATS)
def test_the_command(to: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["export", f"{made / 'good'}{SUFFIX}:0.5", "--to", to, "--base", made / "base", "-o"]
    plain = program(*words, "a")
    (path,) = plain.out.splitlines()
    assert plain.code == 0 and Path(path).is_absolute() and Path(path).exists()
    (note,) = plain.err.splitlines()
    assert note.startswith(f"{to} in float32, ") and Path(path).name in note
    spoken = program(*words, "b", "--json")
    record = spoken.json
    assert spoken.code == 0 and spoken.err == ""
    assert record["schema"] == "conceptzap.export/1" and record["to"] == to
    assert record["bytes"] == sum(map(len, _bytes(Path(record["path"])).values()))
    (one,) = record["erasures"]
    assert set(one) == {"title", "digest", "strength"} and one["strength"] == 0.5
    assert record["relative_error"] < 100 * CLOSE
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(Path(p).name for p in (path, record["path"]))


def test_a_lossy_rank_is_said_on_stderr(made: Path, tmp_path: Path) -> None:
    words = ["export", f"{made / 'dense'}{SUFFIX}", "--to", "lora", "--rank", 2, "--base", made / "base"]
    answer = program(*words, "-o", tmp_path / "a", "--json")
    assert answer.code == 0 and "warning: the rank leaves a relative error of" in answer.err
    assert f"{answer.json['relative_error']}" in answer.err


def test_another_checkpoint_is_warned_of(made: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    words = ["export", f"{made / 'good'}{SUFFIX}", "--to", "checkpoint", "--base", other]
    answer = program(*words, "-o", tmp_path / "a")
    assert answer.code == 0 and "warning: 'Van Gogh' was made and measured on another" in answer.err
    here = load_base(str(other), "cpu")
    is_exported(here, tmp_path / "a", format.load(made / f"good{SUFFIX}").edits)


def test_an_attached_erasure_does_not_travel_and_its_docs_say_so(sd1: Base, tmp_path: Path) -> None:
    pipe = tiny("sd1").pipeline()
    conceptzap.apply(pipe, some.erasure(sd1, [some.shared(sd1)]))
    pipe.save_pretrained(str(tmp_path / "saved"))
    assert seen(through_diffusers(sd1, tmp_path / "saved")).equal(seen(sd1))
    from conceptzap.verbs.applying import Handle

    for thing in (conceptzap.apply, Handle):
        assert "save_pretrained" in thing.__doc__ and "export" in thing.__doc__
