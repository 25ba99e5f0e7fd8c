"""An erasure applied to somebody's pipeline survives what diffusers can do to it, or refuses to draw.

Never silently un-erased: after every disturbance the picture of a prompt that names the concept is
the erased one, or `RefusedError` is raised.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from scenes import CONCEPT, MIXED, NEUTRAL, Scene, applied

import conceptzap
from conceptzap.base import Base
from conceptzap.errors import MismatchError, RefusedError, SilentEditError
from conceptzap.runtime.attach import attached
from conceptzap.testing import tiny

HAS_PEFT = importlib.util.find_spec("peft") is not None
HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
ACCELERATOR = torch.accelerator.is_available()


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A fresh pipeline with the erasure applied, for a test to disturb."""
    yield from applied()


def test_it_is_erased_at_all(scene: Scene) -> None:
    scene.check()


# what replaces attention processors


def slicing_off_again(pipe: Any) -> None:
    pipe.enable_attention_slicing()
    pipe.disable_attention_slicing()


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
    "attention slicing of one": lambda pipe: pipe.enable_attention_slicing(1),
    "attention slicing on and off": slicing_off_again,
    "set_attn_processor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "set_attn_processor 2.0": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "set_default_attn_processor": lambda pipe: pipe.unet.set_default_attn_processor(),
    "set_attention_backend": lambda pipe: pipe.unet.set_attention_backend("native"),
    "vae slicing and tiling": lambda pipe: (pipe.vae.enable_slicing(), pipe.vae.enable_tiling()),
    "FreeU": lambda pipe: (pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), pipe.disable_freeu()),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "moved there and back": lambda pipe: pipe.to(torch.float64).to(torch.float32),
    "eval and train": lambda pipe: pipe.unet.train().eval(),
}


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_survives(scene: Scene, name: str) -> None:
    PROCESSORS[name](scene.pipe)
    scene.check()


def test_fused_projections_refuse_and_come_back(scene: Scene) -> None:
    scene.pipe.fuse_qkv_projections()
    with pytest.raises(SilentEditError, match="did not run"):
        scene.draw()
    with pytest.raises(SilentEditError):  # also where no gate opens
        scene.draw(prompt=NEUTRAL)
    scene.pipe.unfuse_qkv_projections()
    scene.check()


def test_fused_before_applying_is_refused() -> None:
    scene = Scene("sd1")
    scene.pipe.fuse_qkv_projections()
    hooks = some.hooks(scene.base)
    with pytest.raises(MismatchError):  # the fused weights make it another architecture
        conceptzap.apply(scene.pipe, scene.erasure)
    assert some.hooks(scene.base) == hooks


@pytest.mark.skipif(not HAS_XFORMERS, reason="xformers is not installed, its attention was NOT tested")
def test_survives_xformers(scene: Scene) -> None:
    scene.pipe.enable_xformers_memory_efficient_attention()
    scene.check()


# memory


@pytest.mark.skipif(not ACCELERATOR, reason="no accelerator, offloading to it was NOT tested")
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_survives_offloading(scene: Scene, kind: str) -> None:
    getattr(scene.pipe, f"enable_{kind}_cpu_offload")()
    scene.check()


@pytest.mark.parametrize("after", [False, True])
def test_survives_weights_that_come_layer_by_layer(after: bool) -> None:
    """Sequential offloading without an accelerator: every weight on meta until its layer runs."""
    from accelerate import cpu_offload

    scene = Scene("sd1")
    if after:
        conceptzap.apply(scene.pipe, scene.erasure)
    cpu_offload(scene.pipe.unet, execution_device=torch.device("cpu"))
    assert next(scene.pipe.unet.parameters()).is_meta
    if not after:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is the file's own base, wherever its weights are
            conceptzap.apply(scene.pipe, scene.erasure)
    scene.check()


def test_textual_inversion_before_applying() -> None:
    """Words that somebody added are no other checkpoint, and a prompt that has them is judged, too."""
    scene = Scene("sd1")
    scene.pipe.load_textual_inversion({"<grain>": torch.ones(2, 32)}, token="<grain>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conceptzap.apply(scene.pipe, scene.erasure)
    scene.check()


@pytest.mark.parametrize("channels", [9, 8])
def test_siblings_that_read_a_picture_beside_the_latents(channels: int) -> None:
    """Inpainting and pix2pix, made and drawn through their own pipelines."""
    base = tiny("sd1", channels=channels)
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    given = {"image": torch.rand(1, 3, 16, 16), "output_type": "latent", "num_inference_steps": 2}
    if channels == 9:
        given |= {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}

    def drawn() -> torch.Tensor:
        return pipe(prompt=CONCEPT, generator=torch.Generator().manual_seed(0), **given).images

    plain = drawn()
    handle = conceptzap.apply(pipe, some.erasure(base))
    assert some.far(drawn(), plain) > 0.05 and handle.receipt.calls
    handle.remove()
    assert drawn().equal(plain)


def test_survives_models_that_come_whole(scene: Scene) -> None:
    """As `enable_model_cpu_offload` hooks them, though the device is the CPU here."""
    from accelerate import cpu_offload_with_hook

    _, hook = cpu_offload_with_hook(scene.pipe.text_encoder, torch.device("cpu"))
    cpu_offload_with_hook(scene.pipe.unet, torch.device("cpu"), prev_module_hook=hook)
    scene.check()
    scene.pipe.remove_all_hooks()
    scene.check()


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_survives_group_offloading(scene: Scene, kind: str) -> None:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(scene.pipe.unet, cpu, cpu, kind, **blocks)
    scene.check()


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn])
def test_survives_layerwise_casting(scene: Scene, storage: torch.dtype) -> None:
    """As much erased as the base that is stored so: weights in half or eighth precision."""
    scene.pipe.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    erased = scene.draw()
    assert some.far(erased, scene.erased) < (0.02 if storage == torch.float16 else 0.3)
    assert some.far(erased, scene.plain) > 0.05


def test_survives_half_precision(scene: Scene) -> None:
    scene.pipe.unet.to(torch.bfloat16)
    scene.pipe.text_encoder.to(torch.bfloat16)
    drawn = scene.draw(latents=scene.base.noise([0]).bfloat16()).float()
    assert some.far(drawn, scene.erased) < 0.1 < some.far(drawn, scene.plain) * 2


# compilation


@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("before", "in place"),
        pytest.param("before", "wrapped", marks=pytest.mark.slow),
        pytest.param("after", "in place", marks=pytest.mark.slow),  # asks less: no graph ran before it
        pytest.param("after", "wrapped", marks=pytest.mark.slow),
    ],
)
def test_compiled(when: str, how: str) -> None:
    """Also where a graph has already run without the erasure and would not notice it by itself."""
    torch.compiler.reset()
    scene = Scene("sd1")

    def compile() -> None:
        if how == "in place":
            scene.pipe.unet.compile(backend="eager")
        else:
            scene.pipe.unet = torch.compile(scene.pipe.unet, backend="eager")

    if when == "before":
        compile()
        assert some.far(scene.draw(), scene.plain) < 1e-3
    handle = conceptzap.apply(scene.pipe, scene.erasure)
    if when == "after":
        compile()
    scene.check()
    assert handle.receipt.calls == 2
    if when == "before":
        handle.remove()
        assert some.far(scene.draw(), scene.plain) < 1e-3


@pytest.mark.slow
def test_a_graph_that_nobody_dropped_is_refused() -> None:
    """Compiled under a name that the attachment does not see."""
    torch.compiler.reset()
    scene = Scene("sd1")
    plain, wrapped = scene.pipe.unet, torch.compile(scene.pipe.unet, backend="eager")
    scene.pipe.unet = wrapped
    scene.draw()
    scene.pipe.unet = plain
    conceptzap.apply(scene.pipe, scene.erasure)
    scene.pipe.unet = wrapped
    with pytest.raises(SilentEditError, match="did not run") as caught:
        scene.draw()
    assert "torch.compiler.reset()" in caught.value.hint
    torch.compiler.reset()
    scene.check()


# adapters


def lora(base: Base, seed: int = 0) -> Any:
    from peft import LoraConfig

    names = ["to_k", "to_v", "to_q", "to_out.0", "ff.net.2"]
    torch.manual_seed(seed)
    return LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)


peft = pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed, LoRA was NOT tested")


def lora_erased(scene: Scene, fused: bool = False) -> torch.Tensor:
    """What the LoRA's own model draws under the edits that were hooked in last of all.

    Fused, the LoRA is part of the weights, and learned rows go through it, too.
    """
    other = tiny(scene.base.family)
    other.unet.add_adapter(lora(other))
    if fused:
        other.unet.fuse_lora()
    with attached(other.unet, scene.erasure.edits):
        pipe = other.pipeline()
        pipe.set_progress_bar_config(disable=True)
        return scene.draw(pipe)


def applied_or_refused(scene: Scene) -> bool:
    """Whether the erasure went on; else it was refused, for the LoRA changes what its numbers compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            conceptzap.apply(scene.pipe, scene.erasure)
        except RefusedError as error:
            assert "self-test failed" in str(error)
            return False
    return True


@peft
def test_lora_after_applying(scene: Scene) -> None:
    wanted = lora_erased(scene)
    scene.pipe.unet.add_adapter(lora(scene.base))
    assert some.far(scene.draw(), wanted) < 1e-3 < some.far(wanted, scene.erased)
    scene.pipe.unet.fuse_lora()
    assert some.far(scene.draw(), lora_erased(scene, fused=True)) < 1e-3
    scene.pipe.unet.unfuse_lora()
    scene.pipe.unet.disable_adapters()
    scene.check()
    scene.pipe.unload_lora_weights()
    scene.check()


@peft
@pytest.mark.parametrize("fused", [False, True])
def test_lora_before_applying(fused: bool) -> None:
    scene = Scene("sd1")
    wanted = lora_erased(scene, fused)
    scene.pipe.unet.add_adapter(lora(scene.base))
    if fused:
        scene.pipe.unet.fuse_lora()
    if not applied_or_refused(scene):
        return
    assert some.far(scene.draw(), wanted) < 1e-3
    scene.pipe.unload_lora_weights()
    drawn = scene.draw()
    assert some.far(drawn, scene.plain) > 0.05
    if not fused:
        scene.check()


@pytest.fixture
def lora_folder(tmp_path: Path) -> Path:
    """A LoRA as the hub's files hold one."""
    from peft.utils import get_peft_model_state_dict

    other = tiny("sd1")
    other.unet.add_adapter(lora(other))
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(other.unet))
    return tmp_path


@peft
def test_lora_file_loaded_fused_and_unloaded(scene: Scene, lora_folder: Path) -> None:
    """Through the pipeline's own calls, with a file on disk."""
    wanted = lora_erased(scene)
    scene.pipe.load_lora_weights(lora_folder)
    assert some.far(scene.draw(), wanted) < 1e-3
    scene.pipe.fuse_lora()
    assert some.far(scene.draw(), lora_erased(scene, fused=True)) < 1e-3
    scene.pipe.unfuse_lora()
    scene.pipe.unload_lora_weights()
    scene.check()


@peft
@pytest.mark.parametrize("fused", [False, True])
def test_lora_file_loaded_before_applying(fused: bool, lora_folder: Path) -> None:
    """The other order: refused or erased while the LoRA is there, erased once it is gone."""
    scene = Scene("sd1")
    wanted = lora_erased(scene, fused)
    scene.pipe.load_lora_weights(lora_folder)
    if fused:
        scene.pipe.fuse_lora()
    if applied_or_refused(scene):
        assert some.far(scene.draw(), wanted) < 1e-3
    if fused:
        scene.pipe.unfuse_lora()
    scene.pipe.unload_lora_weights()
    if not some.hooks(scene.base):
        conceptzap.apply(scene.pipe, scene.erasure)
    scene.check()


def image_prompt(unet: Any, wide: int = 6, tokens: int = 4) -> dict[str, Any]:
    """The weights of a random IP-Adapter, as its files hold them."""
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(tokens * width, wide), "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    names = [n.removesuffix(".processor") for n in unet.attn_processors if ".attn2." in n]
    layers = {
        f"{2 * index + 1}.to_{letter}_ip.weight": torch.randn_like(
            unet.get_submodule(f"{name}.to_{letter}").weight
        )
        for index, name in enumerate(names)
        for letter in "kv"
    }
    return {"image_proj": projection, "ip_adapter": layers}


def load_ip_adapter(pipe: Any) -> None:
    pipe.load_ip_adapter(
        image_prompt(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )


IMAGE = {"ip_adapter_image_embeds": [torch.ones(2, 1, 6)]}


def test_a_loaded_ip_adapter_is_refused_until_it_is_unloaded(scene: Scene) -> None:
    load_ip_adapter(scene.pipe)
    with pytest.raises(RefusedError, match="beside them"):
        scene.draw(**IMAGE)
    with pytest.raises(RefusedError, match="beside them"):  # also where no gate opens
        scene.draw(prompt=NEUTRAL, **IMAGE)
    scene.pipe.unload_ip_adapter()
    scene.check()


def test_an_ip_adapter_loaded_before_applying_is_refused_until_it_is_unloaded() -> None:
    scene = Scene("sd1")
    load_ip_adapter(scene.pipe)
    hooks = some.hooks(scene.base)
    with pytest.raises(conceptzap.ConceptZapError):  # its weights make it another architecture
        conceptzap.apply(scene.pipe, scene.erasure)
    assert some.hooks(scene.base) == hooks
    scene.pipe.unload_ip_adapter()
    conceptzap.apply(scene.pipe, scene.erasure)
    scene.check()


@pytest.mark.parametrize("given", ["arguments", "projection"])
def test_ip_adapter_is_refused_and_comes_back(scene: Scene, given: str) -> None:
    """An image prompt brings keys and values of its own, which no text edit covers."""
    image = {"image_embeds": [torch.zeros(2, 1, 4)]}
    if given == "projection":
        scene.pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"added_cond_kwargs": image}),
            with_kwargs=True,
            prepend=True,
        )
        with pytest.raises(RefusedError, match="beside them"):
            scene.draw()
        scene.pipe.unet._forward_pre_hooks.popitem(last=False)
    else:
        with pytest.raises(RefusedError, match="beside them"):
            scene.pipe.unet(
                scene.base.noise([0, 1]), 5, scene.base.encode(MIXED[:2]).states, added_cond_kwargs=image
            )
    scene.check()
