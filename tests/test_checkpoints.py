"""Checkpoint folders: loaded whole and without running their code, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import small
import torch
from refusals import edit_json, refusal
from safetensors.torch import load_file, save_file

from conceptzap.base import from_pipeline, load_base, loading, opening
from conceptzap.base.bpe import clip_tokenizer
from conceptzap.base.layout import weight_files
from conceptzap.errors import MismatchError, ResourceError, UsageError
from conceptzap.testing import FAMILIES, save_tiny, tiny
from conceptzap.training import detector, objectives
from conceptzap.trust import canary

SENTENCES = ["a photo of a cat", "van gogh, in oil", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the sd1 checkpoint that a test may break."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "broken"))


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_is_the_base_that_was_saved(folders: dict[str, Path], family: str) -> None:
    loaded, made = load_base(str(folders[family]), device="cpu"), tiny(family)
    assert (loaded.family, loaded.prediction) == (family, made.prediction)
    assert loaded.ref.fingerprint == made.ref.fingerprint
    assert loaded.signature == made.signature
    assert loaded.id == family  # the folder's name and never its path
    cond, latents = loaded.encode(SENTENCES), made.noise([1, 2, 3])
    assert torch.equal(
        loaded.eps(latents, 300, cond), made.eps(latents, 300, made.encode(SENTENCES))
    )


def test_nothing_of_a_loaded_base_can_be_trained(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["sd1"]))
    modules = (base.unet, *base.text_encoders, base.vae)
    assert not any(value.requires_grad for module in modules for value in module.parameters())
    assert not any(module.training for module in modules)


def test_fp16_copy_loads_in_fp32_with_the_same_identity(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = load_base(str(folders["sdxl"])).pipeline().to(torch.float16)
    pipe.save_pretrained(str(tmp_path), variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    half, whole = load_base(str(tmp_path), device="cpu"), tiny("sdxl")
    assert half.unet.dtype == half.vae.dtype == half.text_encoders[1].dtype == torch.float32
    assert half.fingerprint(["unet.conv_in"]) == whole.fingerprint(["unet.conv_in"])
    assert half.signature == whole.signature


def test_sharded_weights_load(folder: Path) -> None:
    unet = load_base(str(folder)).unet
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(str(folder / "unet"), max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert load_base(str(folder)).signature == tiny("sd1").signature


@pytest.mark.parametrize("missing", ["prediction_type", None])
def test_sd2_that_does_not_say_what_it_predicts(
    folders: dict[str, Path], tmp_path: Path, missing: str | None
) -> None:
    copy = Path(shutil.copytree(folders["sd2"], tmp_path / "sd2"))
    config = copy / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    values.pop(missing, None)
    config.write_text(json.dumps(values))
    if missing is None:
        assert load_base(str(copy)).prediction == "v_prediction"
        return
    assert "--prediction" in refusal(UsageError, copy).hint
    assert load_base(str(copy), prediction="epsilon").prediction == "epsilon"


def test_demo_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "DEMO_FOLDER", tmp_path)
    assert "demo" in str(refusal(ResourceError, "demo"))


def test_demo_is_called_demo(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setattr(loading, "DEMO_FOLDER", folders["sd1"])
    assert load_base(device="cpu").ref.id == "demo"


# -- refusals ----------------------------------------------------------------------------------


def test_missing_base_is_one_line_with_the_nearest_name(folders: dict[str, Path]) -> None:
    error = refusal(ResourceError, folders["sd1"].parent / "sd")
    assert "did you mean" in error.hint
    assert "hub id" in refusal(ResourceError, "no-such-base").hint


def test_folder_without_index(tmp_path: Path) -> None:
    assert "model_index.json" in str(refusal(ResourceError, tmp_path))


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("text", ["{", "[1]", "\x00\xff", ""])
def test_malformed_json(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text, encoding="latin-1")
    assert file.rsplit("/")[-1] in str(refusal(ResourceError, folder))


@pytest.mark.parametrize(
    "config",
    [{"cross_attention_dim": 7, "block_out_channels": [16]}, {"down_block_types": ["Nonsense"]}],
)
def test_config_that_does_not_describe_the_weights(folder: Path, config: dict[str, object]) -> None:
    edit_json(folder / "unet" / "config.json", **config)
    assert refusal(ResourceError, folder).exit_code == 5


def test_transformer_models_are_refused_with_the_reason(folder: Path) -> None:
    for kind in ("StableDiffusion3Pipeline", "FluxPipeline", "PixArtAlphaPipeline"):
        edit_json(
            folder / "model_index.json",
            _class_name=kind,
            transformer=["diffusers", "SomeTransformer"],
        )
        error = refusal(MismatchError, folder)
        assert kind in str(error) and "no cross-attention text layers" in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": ["my_code", "MyUNet"]},
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        {"tokenizer": [None, None]},
        {"vae": "AutoencoderKL"},
        {"_class_name": ["my_pipeline", "MyPipeline"]},
        {"_class_name": "KandinskyPipeline"},
        {"_class_name": None},
    ],
)
def test_classes_off_the_list(folder: Path, changes: dict[str, object]) -> None:
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("my_code.py", "my_pipeline.py", "unet/my_code.py"):
        (folder / name).write_text(code)
    edit_json(folder / "model_index.json", **changes)
    refusal(MismatchError, folder)
    assert not marker.exists()


def test_code_named_in_configs_is_not_run(folder: Path) -> None:
    code = {
        "auto_map": {kind: "evil.Evil" for kind in ("AutoModel", "AutoConfig", "AutoTokenizer")}
    }
    places = ("unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json")
    for place in places:
        path = folder / place
        (path.parent / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        edit_json(path, **code)
    assert load_base(str(folder), device="cpu").signature == tiny("sd1").signature
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "name", ["", "\0", "a" * 5000, "~nobody/x", "/dev/null", "../..", "a b\nc"]
)
def test_names_that_are_none(name: str) -> None:
    assert refusal(ResourceError, name).exit_code == 5


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_not_opened(folder: Path, component: str) -> None:
    for path in (folder / component).glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    error = refusal(ResourceError, folder)
    assert component in str(error) and "pickle" in str(error)


def test_index_that_points_at_a_pickle(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    weights.rename(folder / "unet" / "weights.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    assert "not there" in str(refusal(ResourceError, folder))


@pytest.mark.parametrize("shards", [{"conv_in.weight": ["../x.safetensors"]}, "x", None])
def test_index_that_is_none(folder: Path, shards: object) -> None:
    index = {"weight_map": shards}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    assert "not there" in str(refusal(ResourceError, folder))


def test_quantised_weights_and_adapters(folder: Path) -> None:
    (folder / "text_encoder" / "adapter_config.json").write_text("{}")
    assert "adapter" in str(refusal(MismatchError, folder))
    edit_json(folder / "unet" / "config.json", quantization_config={"load_in_8bit": True})
    assert "quantised" in str(refusal(MismatchError, folder))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_missing_tensors_are_named(folder: Path, component: str) -> None:
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    gone = sorted(tensors)[3]
    del tensors[gone]
    save_file(tensors, path, {"format": "pt"})
    assert gone.removeprefix("text_model.") in str(refusal(MismatchError, folder))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_weights_is_named(folder: Path, component: str, value: float) -> None:
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    error = refusal(ResourceError, folder)
    assert "NaN" in str(error) and name.removeprefix("text_model.") in str(error)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    refusal(ResourceError, folder)


def test_text_encoder_of_another_model(folders: dict[str, Path], folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folders["sd2"] / "text_encoder", folder / "text_encoder")
    assert "40 numbers" in str(refusal(MismatchError, folder))


def test_tokenizer_of_another_model(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    clip_tokenizer().save_pretrained(str(folder / "tokenizer"))
    assert "49408 tokens" in str(refusal(MismatchError, folder))


@pytest.mark.parametrize("channels", [9, 8, 5])
def test_siblings_that_read_more_than_latents(tmp_path: Path, channels: int) -> None:
    """Inpainting, pix2pix, depth: what they read beside the latents says nothing."""
    base = tiny("sd1", channels=channels)
    folder = tmp_path / "sibling"
    if channels == 5:  # its pipeline needs a depth estimator
        with pytest.raises(MismatchError, match="depth"):
            base.pipeline()
        save_tiny(folder)
        shutil.rmtree(folder / "unet")
        base.unet.save_pretrained(str(folder / "unet"))
        edit_json(folder / "model_index.json", _class_name="StableDiffusionDepth2ImgPipeline")
    else:
        base.pipeline().save_pretrained(str(folder))
    loaded = load_base(str(folder), device="cpu")
    assert loaded.signature == base.signature and loaded.latent_shape == (4, 8, 8)
    seen = loaded.eps(loaded.noise([0]), 300, loaded.encode(["a cat"]))
    assert seen.shape == (1, 4, 8, 8) and seen.isfinite().all()


@pytest.mark.parametrize("name", ["uce", "zap"])
@pytest.mark.parametrize("channels", [9, 8, 5])
def test_siblings_are_erased(channels: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "DENOISING", 3)
    monkeypatch.setattr(detector, "STEPS", 40)
    base = tiny("sd1", channels=channels)
    edits = small.edits(base, name)
    (test,) = canary.make(base, edits, "a photo of a cat").values()  # every edit acts at all its sites
    assert sorted(test["change"]) == sorted({site for edit in edits for site in edit.sites})


def test_upscaling_unet(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 7}
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(str(folder / "unet"))
    assert "7 channels" in str(refusal(MismatchError, folder))


def test_part_of_a_pipeline_that_has_no_text_encoder(folder: Path) -> None:
    """As SDXL's refiner is."""
    edit_json(folder / "model_index.json", text_encoder=[None, None])
    assert "no text encoder" in str(refusal(MismatchError, folder))
    pipe = tiny("sdxl").pipeline()
    pipe.text_encoder = None
    with pytest.raises(MismatchError, match="no text encoder"):
        from_pipeline(pipe)


@pytest.mark.parametrize(
    ("said", "shape"), [([8, 16], (8, 16)), (4, (4, 4)), (None, (64, 64)), ("absent", (64, 64))]
)
def test_sizes(folder: Path, said: object, shape: tuple[int, int]) -> None:
    path = folder / "unet" / "config.json"
    edit_json(path, sample_size=said)
    if said == "absent":
        config = json.loads(path.read_text())
        del config["sample_size"]
        path.write_text(json.dumps(config))
    base = load_base(str(folder), device="cpu")
    assert base.latent_shape == (4, *shape) and base.size == (2 * shape[0], 2 * shape[1])
    assert base.noise([0]).shape[2:] == shape


@pytest.mark.parametrize("said", [0, [8, "8"], [8, 8, 8], True, 10_000, "8"])
def test_sizes_that_are_none(folder: Path, said: object) -> None:
    edit_json(folder / "unet" / "config.json", sample_size=said)
    assert "size" in str(refusal(MismatchError, folder))


def test_vae_without_its_encoder(folder: Path) -> None:
    """Drawing needs the decoder only; one that has lost a part of its encoder is damaged."""
    (path,) = (folder / "vae").glob("*.safetensors")
    whole = load_file(path)
    decoder = {k: v for k, v in whole.items() if not k.startswith(("encoder.", "quant_conv."))}
    save_file(decoder, path, {"format": "pt"})
    base, other = load_base(str(folder), device="cpu"), tiny("sd1")
    assert base.decode(base.noise([0])).equal(other.decode(other.noise([0])))
    save_file(decoder | {"quant_conv.bias": whole["quant_conv.bias"]}, path, {"format": "pt"})
    assert "encoder" in str(refusal(MismatchError, folder))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_bfloat16_keeps_the_identity(tmp_path: Path, stored: torch.dtype) -> None:
    """The fingerprint is of what is stored; bfloat16 rounds that away."""
    base = tiny("sd1")
    variant = "fp16" if stored == torch.float16 else None
    base.pipeline().to(stored).save_pretrained(str(tmp_path), variant=variant)
    loaded = opening._placed(str(tmp_path), torch.device("cpu"), torch.bfloat16, None)
    assert {m.dtype for m in (loaded.unet, loaded.vae, *loaded.text_encoders)} == {torch.bfloat16}
    assert loaded.fingerprint(["unet.conv_in"]) == tiny("sd1").fingerprint(["unet.conv_in"])
    seen = loaded.eps(loaded.noise([0]), 300, loaded.encode(["a cat"]))
    assert seen.dtype == torch.float32 and seen.isfinite().all()


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_schedules_of_other_models(folder: Path, name: str) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    assert name in str(refusal(MismatchError, folder))


def test_the_demo_is_known_by_its_weights(tmp_path: Path, folders: dict[str, Path]) -> None:
    """And not by what its folder is called."""
    copy = Path(shutil.copytree(loading.DEMO_FOLDER, tmp_path / "mine"))
    assert load_base(str(copy), device="cpu").is_demo
    other = Path(shutil.copytree(folders["sd1"], tmp_path / "demo"))
    assert not load_base(str(other), device="cpu").is_demo


@pytest.mark.parametrize("change", [{"beta_schedule": "nonsense"}, {"num_train_timesteps": "many"}])
def test_scheduler_that_cannot_be_built(folder: Path, change: dict[str, object]) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", **change)
    assert "scheduler" in str(refusal(ResourceError, folder))


def test_unknown_predictions(folder: Path) -> None:
    refusal(UsageError, folder, prediction="velocity")
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    assert "'sample'" in str(refusal(MismatchError, folder))


def test_weight_files_prefer_plain_and_never_pickle() -> None:
    both = ["model.fp16.safetensors", "model.safetensors", "pytorch_model.bin"]
    assert weight_files(both, "text_encoder", "x") == (None, ["model.safetensors"])
    half = [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
    ]
    assert weight_files(half, "unet", "x") == ("fp16", half[:1])
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "model.safetensors.index.json"
    assert weight_files([*shards, index], "text_encoder", "x") == (None, [*shards, index])
    with pytest.raises(ResourceError, match="pickle"):
        weight_files(["pytorch_model.bin"], "text_encoder", "x")
