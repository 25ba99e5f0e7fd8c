"""Checkpoints: found, loaded, identified, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ldm
import pytest
import torch
from safetensors.torch import load_file, save_file

from conceptzap import checkpoints, devices, single_file
from conceptzap.base import CROSS, CROSS_KV, Base, Cond, from_pipeline, load_base
from conceptzap.bpe import clip_tokenizer
from conceptzap.errors import ConceptZapError, MismatchError, ResourceError, UsageError
from conceptzap.layout import weight_files
from conceptzap.testing import FAMILIES, WORDS, save_tiny, tiny

SENTENCES = ["a photo of a cat", "van gogh, in oil", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the sd1 checkpoint that a test may break."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "broken"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(kind: type[ConceptZapError], name: Path | str, **options: str) -> ConceptZapError:
    with pytest.raises(kind) as caught:
        load_base(str(name), device="cpu", **options)
    error = caught.value
    assert type(error) is kind
    assert "\n" not in str(error) and error.hint and "\n" not in error.hint
    return error


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_is_the_base_that_was_saved(folders: dict[str, Path], family: str) -> None:
    loaded, made = load_base(str(folders[family]), device="cpu"), tiny(family)
    assert (loaded.family, loaded.prediction) == (family, made.prediction)
    assert loaded.ref.fingerprint == made.ref.fingerprint
    assert loaded.signature == made.signature
    assert loaded.id == family  # the folder's name and never its path
    cond, latents = loaded.encode(SENTENCES), made.noise([1, 2, 3])
    assert torch.equal(loaded.eps(latents, 300, cond), made.eps(latents, 300, made.encode(SENTENCES)))


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


# -- refusals ----------------------------------------------------------------------------------


def test_missing_base_is_one_line_with_the_nearest_name(folders: dict[str, Path]) -> None:
    error = refusal(ResourceError, folders["sd1"].parent / "sd")
    assert "did you mean" in error.hint
    assert "hub id" in refusal(ResourceError, "no-such-base").hint
    assert "hub" in str(refusal(ResourceError, "nobody/nothing@main"))


def test_folder_without_index(tmp_path: Path) -> None:
    assert "model_index.json" in str(refusal(ResourceError, tmp_path))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
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
            folder / "model_index.json", _class_name=kind, transformer=["diffusers", "SomeTransformer"]
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
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "not there" in str(refusal(ResourceError, folder))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickled_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04N.")
    error = refusal(ResourceError, path)
    assert "pickle" in str(error) and "convert" in error.hint


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


def test_inpainting_unet(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 9}
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(str(folder / "unet"))
    assert "9 channels" in str(refusal(MismatchError, folder))


@pytest.mark.parametrize("change", [{"beta_schedule": "nonsense"}, {"num_train_timesteps": "many"}])
def test_scheduler_that_cannot_be_built(folder: Path, change: dict[str, object]) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", **change)
    assert "scheduler" in str(refusal(ResourceError, folder))


def test_unknown_predictions(folder: Path) -> None:
    refusal(UsageError, folder, prediction="velocity")
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    assert "'sample'" in str(refusal(MismatchError, folder))


# -- one file ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: pytest.FixtureRequest) -> Base:
    return tiny(request.param, clip=True)


@pytest.fixture
def configs(original: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped config folder in miniature: without tokenizers and weights."""
    root = tmp_path / "configs"
    original.pipeline().save_pretrained(str(root / original.family))
    for path in (*root.rglob("*.safetensors"), *root.rglob("tokenizer*.json")):
        path.unlink()
    edit_json(root / original.family / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    monkeypatch.setattr(single_file, "CONFIGS", root)
    monkeypatch.setattr(single_file, "V_SIZE", 8)
    return root


def test_single_file_equals_its_folder(original: Base, configs: Path, tmp_path: Path) -> None:
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
    original: Base, configs: Path, tmp_path: Path
) -> None:
    path = ldm.write(original, tmp_path / "silent.safetensors")
    if original.family == "sd2":
        assert "--prediction" in refusal(UsageError, path).hint
    else:
        assert load_base(str(path)).prediction == "epsilon"
    assert load_base(str(path), prediction="v_prediction").prediction == "v_prediction"


def test_single_file_that_lacks_or_breaks(original: Base, configs: Path, tmp_path: Path) -> None:
    path = ldm.write(original, tmp_path / "x.safetensors", {"modelspec.prediction_type": "epsilon"})
    whole = load_file(path)
    said = {"modelspec.prediction_type": "epsilon"}
    for key in ("model.diffusion_model.out.2.weight", single_file.VAE.replace("conv_in", "conv_out")):
        save_file({k: v for k, v in whole.items() if k != key}, path, said)
        assert "lacks conv_out.weight" in str(refusal(MismatchError, path))
    broken = whole | {single_file.FIRST: whole[single_file.FIRST] * float("nan")}
    save_file(broken, path, said)
    assert "conv_in.weight" in str(refusal(ResourceError, path))
    path.write_bytes(path.read_bytes()[:-1])
    refusal(ResourceError, path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.diffusion_model.joint_blocks.0.context_block.mlp.fc1.bias": 1}, "no cross-attention"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": 1}, "no cross-attention"),
        ({"lora_unet_mid.lora_up.weight": 1}, "a LoRA"),
        ({"something.else": 1}, "no Stable Diffusion checkpoint"),
        ({single_file.FIRST: 9}, "9 channels"),
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


@pytest.mark.parametrize(
    ("family", "unet", "text"),
    [
        ("sd1", 859_520_964, [123_060_480]),
        ("sd2", 865_910_724, [340_387_840]),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_shipped_configs_have_the_published_sizes(family: str, unet: int, text: list[int]) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = single_file.CONFIGS / family
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device("meta"):
        models = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder / "unet"))),
            AutoencoderKL.from_config(AutoencoderKL.load_config(str(folder / "vae"))),
        ]
        models += [
            cls(CLIPTextConfig.from_pretrained(str(path)))
            for cls, path in zip(classes, sorted(folder.glob("text_encoder*")), strict=False)
        ]
    sizes = [sum(value.numel() for value in model.parameters()) for model in models]
    assert sizes == [unet, 83_653_863, *text]


# -- words -------------------------------------------------------------------------------------


def test_clip_tokenizer_is_clips() -> None:
    clip = clip_tokenizer()
    assert len(clip) == 49408
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip("A  PHOTO of a\tcat", add_special_tokens=False).input_ids == [320, 1125, 539, 320, 2368]
    assert clip("hello world!").input_ids == [49406, 3306, 1002, 256, 49407]
    assert clip("кошка 🐱", add_special_tokens=False).unk_token_id not in clip.convert_tokens_to_ids(
        clip.tokenize("кошка 🐱")
    )
    padded = clip_tokenizer("!")("cat", padding="max_length").input_ids
    assert padded[:4] == [49406, 2368, 49407, 0] and len(padded) == 77


def test_small_vocabularies_know_their_words_only(sd1: Base) -> None:
    assert sd1.unknown_words("a photo of a cat") == []
    assert sd1.unknown_words("A zebra, a кошка and a 🐱; a cat. Zebra!") == ["zebra", "кошка", "🐱"]
    assert sd1.token_count("a photo of a cat") == 5
    assert sd1.token_count("cat " * 200) == 200 > sd1.max_tokens == 75
    assert set(sd1.vocabulary()) <= set(WORDS)
    assert {"cat", "church", "gogh", "painting"} <= set(sd1.vocabulary())


def test_large_vocabularies_spell_out() -> None:
    base = tiny("sd1", clip=True)
    assert base.unknown_words("a кошка and a zebra 🐱 qqzzx") == []
    assert len(base.vocabulary()) > 20_000
    assert "cat" in base.vocabulary()


# -- conditioning, noise, pictures -------------------------------------------------------------


def test_encode_pads_and_cuts(base: Base) -> None:
    cond = base.encode([*SENTENCES, "cat " * 200])
    assert cond.states.shape[:2] == (4, 77) and len(cond) == 4
    assert (cond.pooled is None) == (base.family != "sdxl")
    alone = base.encode([SENTENCES[1]])
    torch.testing.assert_close(cond[1].states, alone.states)
    joined = Cond.cat([cond[0], cond[1:]])
    assert torch.equal(joined.states, cond.states)
    if base.family == "sdxl":
        assert torch.equal(joined.pooled, cond.pooled) and joined.time_ids.shape == (4, 6)


def test_encode_is_what_the_pipelines_do(base: Base) -> None:
    pipe = base.pipeline()
    cond = base.encode([SENTENCES[0]])
    if base.family == "sdxl":
        states, _, pooled, _ = pipe.encode_prompt(SENTENCES[0], do_classifier_free_guidance=False)
        assert torch.equal(cond.pooled, pooled)
    else:
        states = pipe.encode_prompt(SENTENCES[0], "cpu", 1, False)[0]
    assert torch.equal(cond.states, states)


def test_noise_depends_on_its_seed_alone(base: Base) -> None:
    rows = base.noise([7, 8, 7])
    assert rows.shape == (3, 4, 8, 8)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(base.noise([8])[0], rows[1])


def test_v_prediction_becomes_noise(sd2: Base) -> None:
    latents, cond = sd2.noise([0, 1]), sd2.encode(SENTENCES[:2])
    times = torch.tensor([10, 900])
    v = sd2.unet(latents, times, encoder_hidden_states=cond.states).sample
    a = sd2.alphas[times].view(-1, 1, 1, 1)
    eps = sd2.eps(latents, times, cond)
    torch.testing.assert_close(eps, a.sqrt() * v + (1 - a).sqrt() * latents)
    x0 = a.sqrt() * latents - (1 - a).sqrt() * v
    torch.testing.assert_close((latents - (1 - a).sqrt() * eps) / a.sqrt(), x0, atol=1e-3, rtol=1e-3)


def test_pipeline_draws_with_the_same_noise_estimate(base: Base) -> None:
    """One DDIM step of a plain pipeline, from the base's own estimate."""
    pipe, noise, cond = base.pipeline(), base.noise([3]), base.encode(SENTENCES[:1])
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        SENTENCES[0], latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    ).images
    pipe.scheduler.set_timesteps(1)
    (t,) = pipe.scheduler.timesteps
    a, before = base.alphas[t], base.alphas[0]
    eps = base.eps(noise, int(t), cond)
    x0 = (noise - (1 - a).sqrt() * eps) / a.sqrt()
    torch.testing.assert_close(drawn, before.sqrt() * x0 + (1 - before).sqrt() * eps, atol=1e-5, rtol=1e-4)


def test_eps_lets_gradients_through(base: Base) -> None:
    shift = torch.zeros(4, requires_grad=True)
    handle = base.unet.conv_out.register_forward_hook(lambda m, x, y: y + shift[:, None, None])
    base.eps(base.noise([0]), 400, base.encode(["cat"])).sum().backward()
    handle.remove()
    assert shift.grad.abs().min() > 0


def test_decode_gives_pictures(base: Base) -> None:
    pictures = base.decode(base.noise([0, 1]))
    assert pictures.shape == (2, base.size, base.size, 3) and pictures.dtype == torch.uint8
    expected = base.pipeline().vae.decode(base.noise([1]) / base.vae.config.scaling_factor).sample
    scaled = ((expected / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (pictures[1:].permute(0, 3, 1, 2).float() - scaled).abs().max() <= 1


# -- modules and identity ----------------------------------------------------------------------


def test_sites_name_modules(base: Base) -> None:
    crosses = base.sites(CROSS)
    assert len(crosses) >= 4 and all(site.endswith(".attn2") for site in crosses)
    assert len(base.sites(CROSS_KV)) == 2 * len(crosses)
    assert base.module(crosses[0]).to_k is base.module(crosses[0] + ".to_k")
    assert base.sites("unet.nothing*") == ()
    for wrong in ("unet.nothing", "vae.encoder", "conv_in"):
        with pytest.raises(MismatchError):
            base.module(wrong)


def test_fingerprint_parts_follow_the_sites(base: Base) -> None:
    inside, outside = base.sites(CROSS_KV)[0], "unet.conv_in"
    assert set(base.fingerprint([inside])) == {"attn2", "text"}
    assert set(base.fingerprint([inside, outside])) == {"attn2", "text", "unet"}
    assert base.reference([inside]) == base.ref


def test_fingerprint_sees_what_it_covers() -> None:
    base = tiny("sd1")
    before = base.fingerprint(["unet.conv_in"])
    with torch.no_grad():
        base.module(base.sites(CROSS)[0]).to_k.weight[0, 0] += 0.5
    after = tiny("sd1", seed=0).fingerprint(["unet.conv_in"])
    assert before == after  # the same arguments, the same weights
    moved = Base(**vars_of(base)).fingerprint(["unet.conv_in"])
    assert moved["text"] == before["text"]
    assert moved["attn2"] != before["attn2"] and moved["unet"] != before["unet"]
    assert tiny("sd1", seed=1).ref.fingerprint["text"] != before["text"]


def vars_of(base: Base) -> dict[str, object]:
    return {name: getattr(base, name) for name in Base.__dataclass_fields__}


def test_signatures_tell_architectures_apart(sd1: Base, sd2: Base, sdxl: Base) -> None:
    assert len({base.signature for base in (sd1, sd2, sdxl)}) == 3
    assert tiny("sd1", seed=5).signature == sd1.signature


def test_pipeline_and_back(base: Base) -> None:
    again = from_pipeline(base.pipeline())
    assert again.family == base.family and again.prediction == base.prediction
    assert again.ref.signature == base.signature
    assert again.fingerprint([]) == base.fingerprint([])


def test_wrapped_modules_keep_their_identity(sd1: Base) -> None:
    wrapped = torch.nn.Module()
    wrapped._orig_mod = sd1.unet
    fields = vars_of(sd1) | {"unet": wrapped}
    assert Base(**fields).signature == sd1.signature
    assert Base(**fields).fingerprint([]) == sd1.fingerprint([])


# -- devices -----------------------------------------------------------------------------------


def test_devices() -> None:
    assert devices.pick_device("cpu") == torch.device("cpu")
    assert devices.pick_device("auto").type in ("cuda", "mps", "cpu")
    for word in ("gpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(UsageError, match="no device"):
            devices.pick_device(word)
    with pytest.raises(ResourceError) as caught:
        devices.pick_device("cuda:64")
    assert "cpu" in caught.value.hint and caught.value.exit_code == 5


def test_dtypes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert {devices.pick_dtype(name, cpu) for name in ("auto", *devices.DTYPES)} == {torch.float32}
    assert devices.pick_dtype("auto", cuda) == torch.float16
    assert devices.pick_dtype("fp32", cuda) == torch.float32
    with pytest.raises(UsageError):
        devices.pick_dtype("int8", cpu)


def test_half_precision_vae_that_overflows_decodes_in_full(sd1: Base) -> None:
    base = tiny("sd1")
    assert base.vae.config.force_upcast
    base.vae.half()
    latents = base.noise([0])
    assert (base.decode(latents).int() - sd1.decode(latents).int()).abs().max() <= 1
    assert base.vae.dtype == torch.float16


def test_weight_files_prefer_plain_and_never_pickle() -> None:
    both = ["model.fp16.safetensors", "model.safetensors", "pytorch_model.bin"]
    assert weight_files(both, "text_encoder", "x") == (None, ["model.safetensors"])
    half = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"]
    assert weight_files(half, "unet", "x") == ("fp16", half[:1])
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "model.safetensors.index.json"
    assert weight_files([*shards, index], "text_encoder", "x") == (None, [*shards, index])
    with pytest.raises(ResourceError, match="pickle"):
        weight_files(["pytorch_model.bin"], "text_encoder", "x")


def test_demo_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "DEMO_FOLDER", tmp_path)
    assert "demo" in str(refusal(ResourceError, "demo"))


def test_demo_is_called_demo(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setattr(checkpoints, "DEMO_FOLDER", folders["sd1"])
    assert load_base(device="cpu").ref.id == "demo"
