"""The ComfyUI nodes, on a real ComfyUI engine where one is installed, and always on a stand-in of it.

A random UNet of Stable Diffusion 1's shape, small, under the original names of a single file. ComfyUI's Euler
steps in sigmas are our DDIM steps in another scale, so both end at the same latents.
"""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy_engine
import edits as some
import pytest
import standin
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from conceptzap import format
from conceptzap.base import Base, original, single_file
from conceptzap.edit import Edit, sort_edits
from conceptzap.errors import MismatchError, RefusedError, SilentEditError, UsageError
from conceptzap.integrations import comfyui, patcher
from conceptzap.integrations.original import Mirror
from conceptzap.result import Settings
from conceptzap.runtime import guides
from conceptzap.runtime.attach import attached
from conceptzap.runtime.sampler import denoise
from conceptzap.testing import tiny

WIDTH, STEPS, SCALE = 32, 4, 5.0
ROUNDING = 1e-5
PROMPT, OTHER = "van gogh", "a photo of a cat"
SHAPE = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": WIDTH, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
    "transformer_depth_middle": 1, "num_heads": 4, "num_head_channels": -1, "use_spatial_transformer": True,
    "use_linear_in_transformer": False, "use_checkpoint": False, "legacy": False, "adm_in_channels": None,
    "use_temporal_attention": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny Stable Diffusion 1 with norms of 32 groups, as the original code has them."""
    whole = tiny("sd1")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(WIDTH, 2 * WIDTH), layers_per_block=1, norm_num_groups=32,
            attention_head_dim=4, cross_attention_dim=whole.unet.config.cross_attention_dim,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    return replace(whole, unet=unet).frozen()


@dataclass
class Program:
    """A patcher of the checkpoint, and how the program draws with one: from latents, by sigmas."""

    patcher: Any
    sample: Callable[[Any, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]


def stand_in(base: Base, weights: dict[str, Tensor]) -> Program:
    unet = standin.UNet(WIDTH, base.unet.config.cross_attention_dim).eval().requires_grad_(False)
    unet.load_state_dict(weights)
    made = standin.ModelPatcher(standin.Model(unet, base.alphas))
    return Program(made, stand_in_sample)


def stand_in_sample(model: Any, x: Tensor, sigmas: Tensor, conds: tuple[Tensor, Tensor]) -> Tensor:
    return standin.sample(model, x, sigmas, SCALE, conds)


def real(base: Base, weights: dict[str, Tensor], shape: Mapping[str, Any] = SHAPE) -> Program:
    if lacking := comfy_engine.missing():
        pytest.skip(f"no ComfyUI engine, so it was NOT tested with one: {', '.join(lacking)} not installed")
    engine, device = comfy_engine.engine(), torch.device("cpu")
    shape = {**shape, "context_dim": base.unet.config.cross_attention_dim}
    config = engine.supported_models.SD15(shape)
    config.unet_config = shape
    config.set_inference_dtype(torch.float32, None)
    model = engine.model_base.BaseModel(config, engine.model_base.ModelType.EPS, device=device)
    model.diffusion_model.load_state_dict(weights)
    made = engine.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)

    def sample(p: Any, x: Tensor, sigmas: Tensor, conds: tuple[Tensor, Tensor]) -> Tensor:
        positive, negative = ([[cond, {}]] for cond in conds)
        found = engine.sample.sample_custom(
            p, x / sigmas[0], SCALE, engine.samplers.ksampler("euler"), sigmas, positive, negative,
            torch.zeros_like(x), disable_pbar=True, seed=0,
        )  # fmt: skip
        return found * model.latent_format.scale_factor

    return Program(made, sample)


@pytest.fixture(scope="module", params=[stand_in, real])
def program(request: pytest.FixtureRequest, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return request.param(base, from_single_file(base, tmp_path_factory.mktemp("comfy")))


def from_single_file(base: Base, folder: Path) -> dict[str, Tensor]:
    """A UNet's weights as a program finds them in the checkpoint's one file, by their original names."""
    named = original.tensors(base.unet, base.vae, base.text_encoders, base.family)
    path = folder / "model.safetensors"
    save_file({name: value.contiguous().clone() for name, value in named.items()}, path)
    start, found = "model.diffusion_model.", load_file(path)
    return {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}


def ours(base: Base, prompt: str, edits: tuple[Edit, ...] = ()) -> Tensor:
    settings, cond = Settings(steps=STEPS, guidance=SCALE), base.encode([prompt])
    with torch.no_grad(), attached(base.unet, edits):
        trail = list(denoise(base, cond, base.unconditional(""), settings, base.noise([0])))
    return trail[-1][1]


def theirs(program: Program, base: Base, prompt: str, model: Any = None) -> Tensor:
    """The same with the program: DDIM's latents are its own, divided by sqrt(alpha)."""
    times = [751, 501, 251, 1]
    sigmas = ((1 - base.alphas) / base.alphas).sqrt()[[*times, 0]]
    conds = base.encode([prompt]).states, base.encode([""]).states
    start = base.noise([0]) * (1 + sigmas[0] ** 2).sqrt()
    model = program.patcher if model is None else model
    return program.sample(model, start, sigmas, conds) * base.alphas[0].sqrt()


def erased(program: Program, base: Base, edits: Any, strength: float = 1.0, model: Any = None) -> Any:
    erasure = format.seal(some.erasure(base, edits))
    return patcher.put(program.patcher if model is None else model, erasure, strength)


def every(base: Base) -> tuple[Edit, ...]:
    """Tokens and a text edit behind a gate, layers, convolutions, adapters, masks, keys and values."""
    return sort_edits([
        *some.eraser(base), some.low_rank(base), some.low_rank(base, some.CONVS), some.adapter(base),
        some.columns(base), some.key_values(base), some.low_rank(base, "unet.up_blocks.*.upsamplers.0.conv"),
    ])  # fmt: skip


@pytest.mark.parametrize("prompt", [PROMPT, OTHER])
def test_it_draws_what_our_sampler_draws(prompt: str, program: Program, base: Base) -> None:
    plain = ours(base, prompt)
    assert some.far(theirs(program, base, prompt), plain) < ROUNDING
    wanted, model = ours(base, prompt, every(base)), erased(program, base, every(base))
    assert some.far(theirs(program, base, prompt, model), wanted) < ROUNDING
    assert some.far(plain, wanted) > 100 * ROUNDING


def test_shut_or_removed_it_is_the_base_bit_for_bit(program: Program, base: Base) -> None:
    """Rows are judged by their own text, however they are batched; the model below stays as it is."""
    before = theirs(program, base, PROMPT), theirs(program, base, OTHER)
    model = erased(program, base, some.eraser(base))
    assert theirs(program, base, OTHER, model).equal(before[1])
    assert some.far(theirs(program, base, PROMPT, model), ours(base, PROMPT, some.eraser(base))) < ROUNDING
    assert theirs(program, base, PROMPT).equal(before[0])
    absent = erased(program, base, some.eraser(base), strength=0.0)
    assert theirs(program, base, PROMPT, absent).equal(before[0])
    hooks = [m for m in program.patcher.model.diffusion_model.modules() if m._forward_pre_hooks]
    assert not hooks


def test_files_add_up_in_any_order_and_at_their_strengths(program: Program, base: Base) -> None:
    one, other = some.eraser(base), [some.shared(base, seed=5)]
    wanted = ours(base, PROMPT, sort_edits([*one, *(edit.scaled(0.5) for edit in other)]))
    first = erased(program, base, other, 0.5, erased(program, base, one))
    second = erased(program, base, one, 1.0, erased(program, base, other, 0.5))
    drawn = [theirs(program, base, PROMPT, model) for model in (first, second, first.clone())]
    assert some.far(drawn[0], wanted) < ROUNDING
    assert drawn[0].equal(drawn[1]) and drawn[0].equal(drawn[2])


def test_rows_that_are_conditional(program: Program, base: Base) -> None:
    """`cond_or_uncond` says which they are."""
    edits = (some.conditional(some.shared(base)),)
    drawn = theirs(program, base, PROMPT, erased(program, base, edits))
    assert some.far(drawn, ours(base, PROMPT, edits)) < ROUNDING
    assert some.far(drawn, ours(base, PROMPT, (some.shared(base),))) > 100 * ROUNDING


def leads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From how many rows guidance leads away, call by call."""
    found, leading = [], guides.leading
    monkeypatch.setattr(guides, "leading", lambda below: found.append(leading(below)) or found[-1])
    return found


@pytest.mark.parametrize(("scale", "led"), [(SCALE, [0, 1, 1, 1]), (0.5, [0, 0, 0, 0])])
def test_it_leads_away_only_where_guidance_does(
    program: Program, base: Base, scale: float, led: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a guidance below 1 rows without a prompt are drawn, so what is erased must not stand there."""
    monkeypatch.setattr(sys.modules[__name__], "SCALE", scale)
    both = some.halved(base, gates=[some.gate(base)])
    model, found = erased(program, base, [both]), leads(monkeypatch)
    drawn = theirs(program, base, PROMPT, model)
    assert found == led
    one = replace(both, tensors={"prompt": both.tensors["prompt"]})
    same = theirs(program, base, PROMPT, erased(program, base, [one]))
    assert (some.far(drawn, same) < ROUNDING) == (not any(led))


@pytest.mark.parametrize(("before", "led"), [(0, 1), (2, 0)])
def test_a_text_in_the_middle_is_not_led_away_from(
    program: Program, base: Base, before: int, led: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guider of three texts has its second where others have the one without a prompt."""
    model, found = erased(program, base, [some.halved(base, gates=[some.gate(base)])]), leads(monkeypatch)
    call = {"input": base.noise([0]), "timestep": torch.ones(1), "c": {"c_crossattn": base.encode([PROMPT]).states}}
    for which in (before, 1):
        with torch.no_grad():
            patcher.on(model)(program.patcher.model.apply_model, {**call, "cond_or_uncond": [which]})
        patcher.on(model).after({"denoised": torch.zeros(1), "cond_scale": SCALE})
    assert found == [0, led]


def test_guidance_that_falls_below_1_on_the_way_is_refused(program: Program) -> None:
    wrapper = patcher.Wrapper(program.patcher.model, [], None)
    for scale in (5.0, 1.0, 0.5, 5.0):  # what led nowhere the step before may do so again
        assert wrapper.after({"denoised": 1, "cond_scale": scale}) == 1
    with pytest.raises(RefusedError, match="below 1"):
        wrapper.after({"denoised": 1, "cond_scale": 0.9})


def test_a_silenced_edit_raises(program: Program, base: Base) -> None:
    """Another node's wrapper on top, or one that takes a cross-attention's place: no picture."""
    model = erased(program, base, some.eraser(base))
    over = model.clone()
    over.set_model_unet_function_wrapper(lambda f, call: f(call["input"], call["timestep"], **call["c"]))
    with pytest.raises(SilentEditError, match="passed over in a step"):
        theirs(program, base, PROMPT, over)
    replaced = model.clone()
    replaced.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0)
    with pytest.raises(SilentEditError, match="attn2 (saw 0 of 2 rows|has no place)"):
        theirs(program, base, PROMPT, replaced)
    assert some.far(theirs(program, base, PROMPT, model), ours(base, PROMPT, some.eraser(base))) < ROUNDING


def test_another_wrapper_below_goes_on(program: Program, base: Base) -> None:
    seen, model = [], program.patcher.clone()

    def wrapper(apply_model: Any, call: Any) -> Tensor:
        seen.append(call["cond_or_uncond"])
        return apply_model(call["input"], call["timestep"], **call["c"])

    model.set_model_unet_function_wrapper(wrapper)
    model = erased(program, base, some.eraser(base), model=model)
    assert some.far(theirs(program, base, PROMPT, model), ours(base, PROMPT, some.eraser(base))) < ROUNDING
    assert len(seen) == STEPS


def test_what_cannot_act_there(program: Program, base: Base, sdxl: Base) -> None:
    with pytest.raises(RefusedError, match="guides"):
        erased(program, base, [some.guide(base)])
    for edits in (some.eraser(sdxl), [some.low_rank(sdxl, "unet.add_embedding.linear_1")]):
        with pytest.raises(MismatchError):
            patcher.put(program.patcher, format.seal(some.erasure(sdxl, edits)), 1.0)
    with pytest.raises(UsageError, match="out of range"):
        erased(program, base, some.eraser(base), strength=3.0)


def test_the_nodes(program: Program, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the models folder, onto a MODEL, and what it did there."""
    (tmp_path / "lprompts").mkdir()
    format.save(some.erasure(base, some.eraser(base)), tmp_path / "lprompts" / "vg.lprompt.safetensors")
    folders = types.ModuleType("folder_paths")  # ComfyUI's table of folders, the part that is used
    folders.models_dir, folders.folder_names_and_paths = str(tmp_path), {}
    folders.get_filename_list = lambda name: sorted(
        path.name for place in folders.folder_names_and_paths[name][0] for path in Path(place).iterdir())
    folders.get_full_path_or_raise = lambda name, file: str(
        Path(folders.folder_names_and_paths[name][0][0]) / file)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    load, put, read = (cls() for cls in comfyui.NODE_CLASS_MAPPINGS.values())
    (files,) = load.INPUT_TYPES()["required"]["file"]
    assert files == ["vg.lprompt.safetensors"] and len(load.IS_CHANGED(files[0])) == 64
    (erasure,) = load.load(files[0])
    told = put.apply(program.patcher, erasure, 1.0)
    (model,) = told["result"]
    assert told["ui"]["text"][0].startswith("Van Gogh: ") and len(told["ui"]["text"]) == 1
    for prompt, said in ((PROMPT, f"erased in {STEPS} rows"), (OTHER, "nothing to erase")):
        theirs(program, base, prompt, model)
        receipt = read.read({"samples": None}, model)
        assert said in receipt["result"][1] and f"{STEPS} calls" in receipt["ui"]["text"][0]
    assert "no erasure" in read.read({}, program.patcher)["ui"]["text"][0]
    assert set(comfyui.NODE_DISPLAY_NAME_MAPPINGS) == set(comfyui.NODE_CLASS_MAPPINGS)
    json.dumps([cls.INPUT_TYPES() for cls in comfyui.NODE_CLASS_MAPPINGS.values()])


def test_another_checkpoint_is_said(program: Program, base: Base) -> None:
    moved = some.erasure(base, some.eraser(base))
    header = replace(moved.header, base=replace(moved.header.base, fingerprint={"attn2": "0" * 64}))
    model = patcher.put(program.patcher, format.seal(replace(moved, header=header)), 1.0)
    assert patcher.on(model).erased.foreign() == ["Van Gogh"]


PUBLISHED = {
    "sd1": {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "context_dim": 768, "num_heads": 8,
        "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "context_dim": 2048, "num_heads": -1,
        "num_head_channels": 64, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
        "adm_in_channels": 2816, "num_classes": "sequential",
    },
}  # fmt: skip


def test_real_blocks_of_stable_diffusion_15(base: Base, tmp_path: Path) -> None:
    """All its blocks, in the order of its config, narrow: erased, as ours; shut and removed, bit for bit."""
    config = json.loads((single_file.CONFIGS / "sd1" / "unet" / "config.json").read_text())
    width = base.unet.config.cross_attention_dim
    narrow = {"block_out_channels": (32, 64, 128, 128), "sample_size": 8, "cross_attention_dim": width}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        unet = UNet2DConditionModel.from_config({**config, **narrow})
    whole = replace(base, unet=unet).frozen()
    program = real(whole, from_single_file(whole, tmp_path), {**SHAPE, **PUBLISHED["sd1"]})
    before = theirs(program, whole, PROMPT)
    assert some.far(before, ours(whole, PROMPT)) < ROUNDING
    wanted, model = ours(whole, PROMPT, every(whole)), erased(program, whole, every(whole))
    assert some.far(theirs(program, whole, PROMPT, model), wanted) < ROUNDING
    assert some.far(before, wanted) > 100 * ROUNDING
    gated = erased(program, whole, some.eraser(whole))
    assert theirs(program, whole, OTHER, gated).equal(theirs(program, whole, OTHER))
    assert theirs(program, whole, PROMPT).equal(before)


@pytest.mark.parametrize("family", PUBLISHED)
def test_real_shapes(family: str) -> None:
    """Every parameter of ComfyUI's own UNets is found by its name in diffusers; shapes alone, no weights."""
    if lacking := comfy_engine.missing():
        pytest.skip(f"no ComfyUI engine, so it was NOT tested with one: {', '.join(lacking)} not installed")
    comfy_engine.engine()
    ops = importlib.import_module("comfy.ops").disable_weight_init
    kind = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    config = {**SHAPE, "model_channels": 320, **PUBLISHED[family]}
    if family != "sdxl":
        del config["adm_in_channels"]
    theirs_ = kind(**config, device="meta", operations=ops)
    with init_empty_weights():
        folder = str(single_file.CONFIGS / family / "unet")
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    mirror, own = Mirror(theirs_), dict(theirs_.named_parameters())
    names = dict(unet.named_parameters())
    assert {mirror.original(name) for name in names} == set(own)
    assert all(own[mirror.original(name)].shape == value.shape for name, value in names.items())
    assert {name for name, _ in mirror.names()} == {name for name in names if ".attn2." in name}


def test_the_pack_is_small_and_has_its_registry_form() -> None:
    folder = Path(comfyui.__file__).parent
    assert len((folder / "__init__.py").read_text().splitlines()) < 150
    form = tomllib.loads((folder / "pyproject.toml").read_text())
    assert form["project"]["dependencies"] == ["conceptzap"] and form["tool"]["comfy"]["DisplayName"]
