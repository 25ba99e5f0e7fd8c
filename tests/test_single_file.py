"""Checkpoints in one file, in the original layout, by the configs that are shipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ldm
import pytest
import torch
from refusals import edit_json, refusal
from safetensors.torch import load_file, save_file

from conceptzap.base import Base, load_base, parameters, single_file
from conceptzap.base import original as names
from conceptzap.errors import MismatchError, ResourceError, UsageError
from conceptzap.testing import FAMILIES, tiny

SENTENCES = ["a photo of a cat", "van gogh, in oil", ""]


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: pytest.FixtureRequest) -> Base:
    return tiny(request.param, clip=True)


@pytest.fixture(scope="module")
def shipped(original: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped config folder in miniature."""
    root = tmp_path_factory.mktemp("configs")
    ldm.configs(original, root / original.family)
    edit_json(
        root / original.family / "scheduler" / "scheduler_config.json", prediction_type="epsilon"
    )
    return root


@pytest.fixture
def configs(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file, "CONFIGS", shipped)
    monkeypatch.setattr(single_file, "V_SIZE", 8)


def test_single_file_equals_its_folder(original: Base, configs: None, tmp_path: Path) -> None:
    said = {"modelspec.prediction_type": "v" if original.family == "sd2" else "epsilon"}
    path = ldm.write(original, tmp_path / "one.safetensors", said)
    loaded = load_base(str(path), device="cpu")
    assert (loaded.family, loaded.prediction) == (original.family, original.prediction)
    assert loaded.signature == original.signature
    assert loaded.fingerprint(["unet.conv_in"]) == original.fingerprint(["unet.conv_in"])
    assert loaded.id == "one"
    assert loaded.unet.dtype == torch.float32
    cond, expected = loaded.encode(SENTENCES), original.encode(SENTENCES)
    torch.testing.assert_close(cond.states, expected.states, atol=5e-3, rtol=0)
    noise = original.noise([0, 1, 2])
    torch.testing.assert_close(
        loaded.eps(noise, 500, cond), original.eps(noise, 500, expected), atol=5e-3, rtol=0
    )
    pixels = loaded.decode(noise).int() - original.decode(noise).int()
    assert pixels.abs().max() <= 2


def test_single_file_says_or_is_told_what_it_predicts(
    original: Base, configs: None, tmp_path: Path
) -> None:
    path = ldm.write(original, tmp_path / "silent.safetensors")
    if original.family == "sd2":
        assert "--prediction" in refusal(UsageError, path).hint
    else:
        assert load_base(str(path)).prediction == "epsilon"
    assert load_base(str(path), prediction="v_prediction").prediction == "v_prediction"


def test_single_file_that_lacks_or_breaks(original: Base, configs: None, tmp_path: Path) -> None:
    path = ldm.write(original, tmp_path / "x.safetensors", {"modelspec.prediction_type": "epsilon"})
    whole = load_file(path)
    said = {"modelspec.prediction_type": "epsilon"}
    text = next(key for key in whole if re.search(r"final_layer_norm.weight|ln_final.weight", key))
    gone = {
        "model.diffusion_model.out.2.weight": "lacks conv_out.weight",
        "first_stage_model.decoder.conv_out.weight": "lacks decoder.conv_out.weight",
        text: "final_layer_norm.weight",
    }
    for key, message in gone.items():
        save_file({k: v for k, v in whole.items() if k != key}, path, said)
        assert message in str(refusal(MismatchError, path))
    broken = whole | {single_file.FIRST: whole[single_file.FIRST] * float("nan")}
    save_file(broken, path, said)
    assert "conv_in.weight" in str(refusal(ResourceError, path))
    path.write_bytes(path.read_bytes()[:-1])
    refusal(ResourceError, path)


def test_single_file_of_an_inpainting_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("sd1", clip=True, channels=9)
    ldm.configs(tiny("sd1", clip=True), tmp_path / "configs" / "sd1")
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    loaded = load_base(str(ldm.write(base, tmp_path / "nine.safetensors")), device="cpu")
    assert loaded.signature == base.signature and loaded.latent_shape == (4, 8, 8)


def test_single_file_of_an_old_merge(original: Base, configs: None, tmp_path: Path) -> None:
    """Names without `text_model.`, and a VAE that only decodes."""
    said = {"modelspec.prediction_type": "epsilon"}
    path = ldm.write(original, tmp_path / "x.safetensors", said)
    whole = load_file(path)
    old = {
        name.replace("transformer.text_model.", "transformer."): value
        for name, value in whole.items()
        if not name.startswith(("first_stage_model.encoder", "first_stage_model.quant_conv"))
    }
    save_file(old, tmp_path / "old.safetensors", said)
    loaded = load_base(str(tmp_path / "old.safetensors"), device="cpu")
    assert loaded.signature == original.signature and loaded.vae.encoder is None
    noise = original.noise([0])
    assert (loaded.decode(noise).int() - original.decode(noise).int()).abs().max() <= 2


def test_zero_terminal_snr_is_drawn_from_its_end(configs: None, original: Base, tmp_path: Path) -> None:
    said = {"modelspec.prediction_type": "v"}
    path = ldm.write(original, tmp_path / "z.safetensors", said)
    save_file(load_file(path) | {"ztsnr": torch.zeros(0)}, path, said)
    base = load_base(str(path), device="cpu")
    scheduler = base.scheduler()
    scheduler.set_timesteps(4)
    assert base.prediction == "v_prediction" and base.alphas[-1] == 0
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_single_file_is_not_copied(
    original: Base, configs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored as it is wanted stays on the disk: one reading, no second copy."""
    kept = []
    load = single_file.load_file
    monkeypatch.setattr(single_file, "load_file", lambda path: kept.append(load(path)) or kept[-1])
    path = ldm.write(original, tmp_path / "x.safetensors", {"modelspec.prediction_type": "epsilon"})
    found = single_file.load(path, torch.float16, None)
    (tensors,) = kept
    places = {value.data_ptr() for value in tensors.values()}
    assert all(value.data_ptr() in places for value in found["unet"].parameters())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"model.diffusion_model.joint_blocks.0.context_block.mlp.fc1.bias": 1},
            "no cross-attention",
        ),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": 1}, "no cross-attention"),
        ({"lora_unet_mid.lora_up.weight": 1}, "a LoRA"),
        ({"transformer_blocks.0.attn.add_k_proj.weight": 1}, "no cross-attention"),
        ({"down_blocks.1.transformer_blocks.0.attn2.to_k.weight": 1}, "no Stable Diffusion"),
        ({single_file.FIRST: 7}, "7 channels"),
        ({single_file.REFINER: 4, single_file.FIRST: 4}, "no text encoder"),
        ({single_file.FIRST: 4}, "no text encoder"),
        ({single_file.FIRST: 4, single_file.TEXT["sd1"]: 1}, "no VAE"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, tensors: dict[str, int], said: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1, channels) for name, channels in tensors.items()}, path)
    assert said in str(refusal(MismatchError, path))


def test_erasure_in_place_of_a_base(tmp_path: Path) -> None:
    path = tmp_path / "cat.lprompt.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "lprompt/1"})
    assert "--with" in refusal(MismatchError, path).hint


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04zip", b"<html>", b"\x80\x04N."])
def test_file_that_is_no_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fake.safetensors"
    path.write_bytes(data)
    refusal(ResourceError, path)


@pytest.mark.parametrize("name", ["model", "model.SAFETENSORS", "model.safetensors.tmp"])
def test_safetensors_by_another_suffix(tmp_path: Path, name: str) -> None:
    save_file({single_file.FIRST: torch.zeros(1, 4)}, tmp_path / name)
    assert "no .safetensors" in str(refusal(ResourceError, tmp_path / name))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ".PKL"])
def test_pickled_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04N.")
    error = refusal(ResourceError, path)
    assert "pickle" in str(error) and "convert" in error.hint


# parameters of the UNet and of the text encoders
SIZES = {
    "sd1": (859_520_964, 123_060_480),
    "sd2": (865_910_724, 340_387_840),
    "sdxl": (2_567_463_684, 123_060_480, 694_659_840),
}


@pytest.fixture(scope="module", params=FAMILIES)
def hollow(request: pytest.FixtureRequest) -> tuple[str, Any, Any, list[Any]]:
    """A family and its published structure, whole, without values: UNet, VAE, text encoders."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config = single_file.CONFIGS / request.param
    unet = single_file._hollow(UNet2DConditionModel, config / "unet")
    vae = single_file._hollow(AutoencoderKL, config / "vae")
    encoders = [encoder.to("meta") for encoder in single_file._text_encoders(config, request.param)]
    return request.param, unet, vae, encoders


def test_shipped_configs_have_the_published_sizes(hollow: tuple[str, Any, Any, list[Any]]) -> None:
    family, unet, vae, encoders = hollow
    sizes = [sum(value.numel() for value in model.parameters()) for model in (unet, *encoders, vae)]
    assert sizes == [*SIZES[family], 83_653_863]


def test_original_names_are_those_that_diffusers_reads(hollow: tuple[str, Any, Any, list[Any]]) -> None:
    """Of the published structure, whole: no name is lost and no shape is another."""
    from diffusers.loaders import single_file_utils as layouts

    family, unet, vae, encoders = hollow
    named = names.tensors(unet, vae, encoders, family)
    read = [
        (unet, layouts.convert_ldm_unet_checkpoint(named, unet.config)),
        (vae, layouts.convert_ldm_vae_checkpoint(named, vae.config)),
    ]
    for encoder, (prefix, open_clip) in zip(encoders, names.TEXT[family], strict=True):
        if open_clip:
            read.append((encoder, layouts.convert_open_clip_checkpoint(encoder, named, prefix)))
        else:
            read.append((encoder, layouts.convert_ldm_clip_checkpoint(named)))
    for module, found in read:
        wanted = {name: value.shape for name, value in parameters(module)}
        shapes = {name.removeprefix("text_model."): value.shape for name, value in found.items()}
        if "text_projection.weight" not in wanted:
            shapes.pop("text_projection.weight", None)
        assert shapes == wanted
