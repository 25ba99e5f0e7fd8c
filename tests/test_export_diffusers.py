"""A pipeline folder with an erasure in it: diffusers draws what `apply` draws, or nothing at all."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import edits as some
import pytest
import torch
from command import conceptzap as program
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, UNet2DConditionModel
from exported import save
from process import Program
from torch import Tensor

import conceptzap
import conceptzap.integrations.diffusers
from conceptzap.base import Base, load_base
from conceptzap.errors import MismatchError, RefusedError, UsageError
from conceptzap.testing import save_tiny

MODULE = "conceptzap.integrations.diffusers"
PROMPTS = ("a painting of a cat in the style of van gogh", "a photo of a dog")


def drawn(pipe: DiffusionPipeline, prompt: str) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    made = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=made, output_type="latent").images


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an erasure of every op behind gates, and the folder of both."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny(folder / "base")
    here = load_base(str(folder / "base"), "cpu")
    edits = [*some.eraser(here), some.adapter(here), some.low_rank(here, gates=[some.gate(here)])]
    path = save(folder, here, "a", edits)
    made = conceptzap.export(path, "diffusers", folder / "out", base=str(folder / "base"))
    assert made.facts["dtype"] == "float32" and made.facts["relative_error"] == 0
    assert made.use.startswith(f"import {MODULE}; DiffusionPipeline")
    return folder


def test_it_draws_what_apply_draws(world: Path) -> None:
    """Bit for bit, whether the gate opens or not, and the pipelines that share its UNet, too."""
    plain = DiffusionPipeline.from_pretrained(str(world / "base"))
    pipe = DiffusionPipeline.from_pretrained(str(world / "out"))
    for prompt in PROMPTS:
        before = drawn(plain, prompt)
        with conceptzap.apply(plain, world / "a.lprompt.safetensors"):
            wanted = drawn(plain, prompt)
        assert drawn(pipe, prompt).equal(wanted) and not wanted.equal(before)
    assert pipe.unet.receipt.calls == 4 and len(pipe.unet.receipt.fired()) == 4
    assert AutoPipelineForImage2Image.from_pipe(pipe).unet is pipe.unet
    half = DiffusionPipeline.from_pretrained(str(world / "out"), torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16 and half.unet.receipt.edits


# in a process that has imported what conceptzap needs, and then conceptzap for nothing but this
SCRIPT = f"""
import sys, torch
for name in [name for name in sys.modules if name.startswith("conceptzap")]:
    del sys.modules[name]
import {MODULE}
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("out")
images = pipe({PROMPTS[0]!r}, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
              output_type="latent").images
torch.save(images, "x.pt")
raise SystemExit(0)
"""


def test_in_a_fresh_process(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(world / "out")
    process = Program(SCRIPT, cwd=tmp_path)
    assert process.wait() == 0, process.err
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    assert theirs.equal(drawn(DiffusionPipeline.from_pretrained(str(world / "out")), PROMPTS[0]))


def test_without_conceptzap_nothing_is_loaded(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers names the module that it lacks; no loader finds the plain UNet by itself."""
    monkeypatch.delitem(sys.modules, MODULE)
    with pytest.raises(ValueError, match=MODULE):
        DiffusionPipeline.from_pretrained(str(world / "out"))
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        UNet2DConditionModel.from_pretrained(str(world / "out"), subfolder="unet")
    with pytest.raises(MismatchError, match=MODULE):
        load_base(str(world / "out"), "cpu")
    assert not [one for one in (world / "out").rglob("*") if one.suffix in (".py", ".bin", ".pt")]


def test_it_is_not_saved_un_erased(world: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(str(world / "out"))
    with pytest.raises(RefusedError, match="not saved this way"):
        pipe.save_pretrained(str(tmp_path / "again"))
    with pytest.raises(RefusedError, match="attached already"):
        conceptzap.apply(pipe, world / "a.lprompt.safetensors")


def test_other_weights_are_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "out", tmp_path / "out")
    other = save_tiny(tmp_path / "other", seed=7)
    name = "unet/plain/diffusion_pytorch_model.safetensors"
    shutil.copy(other / name.replace("plain/", ""), tmp_path / "out" / name)
    with pytest.raises(MismatchError, match="made for other weights"):
        DiffusionPipeline.from_pretrained(str(tmp_path / "out"))


def test_what_needs_the_pipeline_is_refused(sd1: Base, tmp_path: Path) -> None:
    for edits in ([some.guide(sd1)], [some.conditional(some.shared(sd1))]):
        with pytest.raises(RefusedError, match="a pipeline folder cannot hold 1 of 1 edit"):
            conceptzap.export(some.erasure(sd1, edits), "diffusers", tmp_path / "x", base=sd1)
    with pytest.raises(UsageError, match="has no --rank"):
        conceptzap.export(some.erasure(sd1), "diffusers", tmp_path / "x", base=sd1, rank=4)


def test_the_command(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["export", f"{world / 'a'}:0.5", "--to", "diffusers", "-o", "out", "--base", world / "base"]
    made = program(*words, "--dtype", "float16", "--json").json
    assert made["dtype"] == "float16" and made["erasures"][0]["strength"] == 0.5
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["unet"] == [MODULE, "ErasedUNet2DConditionModel"]
    assert program(*words).code == 2
