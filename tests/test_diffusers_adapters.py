"""LoRAs and image prompts beside an erasure: it goes on, or nothing is drawn."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch
from diffusers import StableDiffusionPipeline
from scenes import MIXED, NEUTRAL, Scene, applied

import conceptzap
from conceptzap.base import Base
from conceptzap.errors import RefusedError
from conceptzap.runtime.attach import attached
from conceptzap.testing import tiny

HAS_PEFT = importlib.util.find_spec("peft") is not None


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A fresh pipeline with the erasure applied, for a test to disturb."""
    yield from applied()


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
