"""An erasure applied to somebody's pipeline survives what diffusers can do to it, or refuses to draw.

Never silently un-erased: after every disturbance the picture of a prompt that names the concept is
the erased one, or `RefusedError` is raised.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import edits as some
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from scenes import CONCEPT, NEUTRAL, Scene, applied

import conceptzap
from conceptzap.base import Base
from conceptzap.errors import MismatchError, SilentEditError
from conceptzap.runtime.rest import Rest
from conceptzap.testing import tiny

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


def flat() -> Base:
    """The tiny base with one level and no middle: a compiler takes its time for every layer."""
    base = tiny("sd1")
    level = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",),
             "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None,
             "layers_per_block": 1}  # fmt: skip
    torch.manual_seed(0)
    return replace(base, unet=UNet2DConditionModel.from_config({**base.unet.config, **level})).frozen()


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
    """Also where a graph has already run without the erasure and would not notice it by itself.

    The whole erased UNet is one graph: what gates and receipts do is no part of it.
    """
    torch.compiler.reset()
    scene, graphs = Scene("sd1", flat()), []

    def eager(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile() -> None:
        if how == "in place":
            scene.pipe.unet.compile(backend=eager)
        else:
            scene.pipe.unet = torch.compile(scene.pipe.unet, backend=eager)

    if when == "before":
        compile()
        assert some.far(scene.draw(), scene.plain) < 1e-3
    handle = conceptzap.apply(scene.pipe, scene.erasure)
    if when == "after":
        compile()
    graphs.clear()
    scene.check()
    assert handle.receipt.calls == 2 and len(graphs) == 1
    if when == "before":
        handle.remove()
        assert some.far(scene.draw(), scene.plain) < 1e-3


def test_no_hook_rests_where_graphs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would be made without it, and would not notice that it comes back."""
    rested, off = [], Rest.off
    monkeypatch.setattr(Rest, "off", lambda rest, looking: rested.append(rest) or off(rest, looking))
    for compiling in (True, False):
        scene = Scene("sd1")
        with conceptzap.apply(scene.pipe, scene.erasure):
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
                scene.draw(prompt=NEUTRAL)
            scene.draw(prompt=NEUTRAL)
            assert bool(rested) != compiling
            scene.check()


def test_applying_compiles_nothing() -> None:
    """What `torch.compile` wraps is no less a UNet; its self-test does not wait for a graph."""
    scene, graphs = Scene("sd1"), []
    unet = scene.pipe.unet
    scene.pipe.unet = torch.compile(unet, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    handle = conceptzap.apply(scene.pipe, scene.erasure)
    assert not graphs
    scene.pipe.unet = unet  # the hooks are on what is wrapped
    scene.check()
    handle.remove()


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
