"""Whole checkpoints as exports: a folder or one file, replaced whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import edits as some
import erasures
import ldm
import pytest
import torch
from command import contents
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from exported import (
    CLOSE,
    FORMATS,
    is_exported,
    save,
    seen,
)
from safetensors import safe_open
from safetensors.torch import load_file

import conceptzap
from conceptzap import format
from conceptzap.base import Base, load_base, parameters, single_file
from conceptzap.errors import RefusedError, ResourceError, UsageError
from conceptzap.exports import checkpoint
from conceptzap.testing import save_tiny, tiny

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


@pytest.fixture(scope="module")
def with_configs(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """A base with CLIP's own words, and the folder of its configs."""
    found, folder = tiny(base.family, clip=True), tmp_path_factory.mktemp("configs")
    ldm.configs(found, folder / base.family)
    return found, folder


@pytest.fixture
def published(with_configs: tuple[Base, Path], monkeypatch: pytest.MonkeyPatch) -> Base:
    """The base, by whose configs single files are read."""
    found, folder = with_configs
    monkeypatch.setattr(single_file, "CONFIGS", folder)
    monkeypatch.setattr(single_file, "V_SIZE", 8)
    return found


def test_one_file_is_the_whole_checkpoint(published: Base, tmp_path: Path) -> None:
    """Under the original names, every bit of it, and diffusers reads it as we do."""
    edits = [some.low_rank(published), some.shared(published)]
    path, target = save(tmp_path, published, "a", edits), tmp_path / "out.safetensors"
    made = conceptzap.export(path, "checkpoint", target, base=published)
    assert made.path == target and made.facts["dtype"] == "float32"
    kind = StableDiffusionXLPipeline if published.family == "sdxl" else StableDiffusionPipeline
    words = {f"tokenizer{'_2' * n}": tokenizer for n, tokenizer in enumerate(published.tokenizers)}
    config = str(single_file.CONFIGS / published.family)
    pipe = kind.from_single_file(str(target), config=config, local_files_only=True, **words)
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
