"""Other pipelines over an erased UNet, every way to hand a prompt in, and the handles themselves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import edits as some
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from scenes import CONCEPT, MIXED, NEUTRAL, Scene, applied

import conceptzap
from conceptzap.errors import RefusedError
from conceptzap.runtime.attach import attached
from conceptzap.testing import tiny


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A fresh pipeline with the erasure applied, for a test to disturb."""
    yield from applied()


# other pipelines over the same modules


def test_from_pipe(scene: Scene) -> None:
    scene.check(StableDiffusionPipeline.from_pipe(scene.pipe))


def test_rebuilt_from_components(scene: Scene) -> None:
    pipe = StableDiffusionPipeline(**scene.pipe.components, requires_safety_checker=False)
    scene.check(pipe)


def test_deepcopy_of_the_unet(scene: Scene) -> None:
    pipe = StableDiffusionPipeline(
        **scene.pipe.components | {"unet": copy.deepcopy(scene.pipe.unet)}, requires_safety_checker=False
    )
    scene.check(pipe)
    with pytest.raises(RefusedError, match="already"):
        conceptzap.apply(pipe, scene.erasure)
    scene.check(pipe)
    scene.check()


@pytest.mark.parametrize("kind", ["img2img", "auto", "inpainting"])
def test_image_pipelines(kind: str) -> None:
    scene = Scene("sd1")
    make = {
        "img2img": StableDiffusionImg2ImgPipeline.from_pipe,
        "auto": AutoPipelineForImage2Image.from_pipe,
        "inpainting": StableDiffusionInpaintPipeline.from_pipe,
    }[kind]
    side, _ = scene.base.size
    given: dict[str, Any] = {"image": torch.rand(1, 3, side, side), "strength": 1.0}
    if kind == "inpainting":
        given |= {"mask_image": torch.ones(1, 1, side, side), "height": side, "width": side}
    pipe = make(scene.pipe)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return scene.draw(pipe, generator=torch.Generator().manual_seed(0), **given)

    plain = draw()
    with attached(pipe.unet, scene.erasure.edits):
        wanted = draw()
    handle = conceptzap.apply(scene.pipe, scene.erasure)
    assert draw().equal(wanted) and some.far(wanted, plain) > 0.01
    handle.remove()
    assert draw().equal(plain)


def test_saving_writes_the_plain_base(scene: Scene, tmp_path: Any) -> None:
    scene.pipe.save_pretrained(tmp_path)
    back = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    back.set_progress_bar_config(disable=True)
    assert scene.draw(back).equal(scene.plain)


# what a prompt can be


def test_prompt_embeds_handed_in(scene: Scene) -> None:
    states = scene.base.encode([CONCEPT, ""]).states
    embeds = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    assert some.far(scene.draw(prompt=None, **embeds)[:1], scene.erased) < 1e-5


@pytest.mark.parametrize("place", ["first", "second"])
def test_long_and_weighted_prompts(scene: Scene, place: str) -> None:
    """Two contexts in a row, 154 tokens, with weights, as prompt tools hand them in."""
    asked, other = (1.3 * scene.base.encode([prompt]).states for prompt in (CONCEPT, NEUTRAL))
    order = [asked, other] if place == "first" else [other, asked]
    embeds = torch.cat(order, 1)
    empty = torch.cat([scene.base.encode([""]).states] * 2, 1)
    assert embeds.shape[1] == 154
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": empty}
    drawn = scene.draw(**given)
    other_base = Scene("sd1")
    plain = other_base.draw(**given)
    with attached(other_base.pipe.unet, scene.erasure.edits):
        assert other_base.draw(**given).equal(drawn)
    assert some.far(drawn, plain) > 0.01


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_mixed_batch_with_guidance(family: str) -> None:
    """Every row equals its solo run; a batch that opens no gate keeps its bits."""
    scene = Scene(family)
    neutral = list(some.OTHER[1:])
    untouched = scene.draw(prompt=neutral)
    noise = scene.base.noise(range(4))
    base_alone = [scene.draw(prompt=MIXED[i], latents=noise[[i]]) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = conceptzap.apply(scene.pipe, scene.erasure)
    together = scene.draw(prompt=MIXED)
    for i, prompt in enumerate(MIXED):
        alone = scene.draw(prompt=prompt, latents=noise[[i]])
        assert some.far(together[[i]], alone) < 1e-4
        assert alone.equal(base_alone[i]) == (prompt in some.OTHER)
    assert scene.draw(prompt=neutral).equal(untouched)
    handle.remove()
    assert scene.draw().equal(scene.plain)


def test_a_negative_prompt_that_names_the_concept() -> None:
    """Its rows are erased too, so that steering away from the concept cannot reach it either."""
    scene, given = Scene("sd1"), {"prompt": NEUTRAL, "negative_prompt": [CONCEPT]}
    plain = scene.draw(**given)
    with attached(scene.pipe.unet, scene.erasure.edits) as receipt:
        wanted = scene.draw(**given)
    assert all(sorted(tally.opened) == [0] for tally in receipt.tallies)
    conceptzap.apply(scene.pipe, scene.erasure)
    assert scene.draw(**given).equal(wanted) and some.far(wanted, plain) > 0.01


def test_no_guidance(scene: Scene) -> None:
    scene.draw(guidance_scale=1.0)
    other = Scene("sd1")
    with attached(other.pipe.unet, other.erasure.edits):
        wanted = other.draw(guidance_scale=1.0)
    assert scene.draw(guidance_scale=1.0).equal(wanted)


# handles


def test_handles_stack_and_leave_one_another() -> None:
    scene = Scene("sd1")
    second = some.erasure(scene.base, [some.adapter(scene.base)])
    one = conceptzap.apply(scene.pipe, scene.erasure)
    two = conceptzap.apply(scene.pipe, second)
    both = scene.draw()
    assert not both.equal(scene.erased)
    one.remove()
    only_second = scene.draw()
    one_again = conceptzap.apply(scene.pipe, scene.erasure)
    assert scene.draw().equal(both)
    two.remove()
    scene.check()
    one_again.remove()
    assert scene.draw().equal(scene.plain)
    assert not only_second.equal(scene.plain) and not only_second.equal(both)
    one.remove()
    assert some.hooks(scene.base) == 0


# parts that are replaced


def drawn_or_refused(scene: Scene, given: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="was replaced") as caught:
        scene.draw(**given)
    assert caught.value.exit_code == 6 and "put the" in caught.value.hint


@pytest.mark.parametrize("how", ["prompt", "embeddings"])
def test_a_unet_that_was_replaced_is_refused(scene: Scene, how: str) -> None:
    """Never silently un-erased: also with embeddings handed in, where nothing is encoded."""
    states = scene.base.encode([CONCEPT, ""]).states
    embeds = {"prompt": None, "prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    given = embeds if how == "embeddings" else {}
    erased = scene.pipe.unet
    for other in (tiny("sd1").unet, torch.compile(tiny("sd1").unet, backend="eager"), None):
        scene.pipe.unet = other
        drawn_or_refused(scene, given)
    scene.pipe.register_modules(unet=tiny("sd1").unet)
    drawn_or_refused(scene, given)
    scene.pipe.unet = copy.deepcopy(erased)  # hooks and all
    assert some.far(scene.draw(**given)[:1], scene.erased) < 1e-3
    scene.pipe.unet = erased
    scene.check()


def test_a_unet_with_other_erasures_is_refused(scene: Scene) -> None:
    other = Scene("sd1")
    with conceptzap.apply(other.pipe, some.erasure(other.base, [some.adapter(other.base)])):
        mine, scene.pipe.unet = scene.pipe.unet, other.pipe.unet
        drawn_or_refused(scene, {})
        scene.pipe.unet = mine
    scene.check()


def test_a_text_encoder_that_was_replaced_is_refused(scene: Scene) -> None:
    mine = scene.pipe.text_encoder
    scene.pipe.text_encoder = tiny("sd1", seed=1).text_encoders[0]
    drawn_or_refused(scene, {})
    scene.pipe.text_encoder = None  # freed, as where embeddings are handed in
    states = scene.base.encode([CONCEPT, ""]).states
    embeds = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    assert some.far(scene.draw(prompt=None, **embeds)[:1], scene.erased) < 1e-5
    scene.pipe.text_encoder = mine
    scene.check()


def test_a_submodule_that_was_replaced_is_refused(scene: Scene) -> None:
    block, plain = scene.pipe.unet.mid_block, tiny("sd1").unet.mid_block
    scene.pipe.unet.mid_block = plain
    with pytest.raises(RefusedError, match="did not run"):
        scene.draw()
    scene.pipe.unet.mid_block = block
    scene.check()


def test_a_watched_pipeline_looks_and_copies_like_a_plain_one(scene: Scene, tmp_path: Any) -> None:
    kind = type(scene.pipe)
    assert kind.__name__ == "StableDiffusionPipeline" and isinstance(scene.pipe, StableDiffusionPipeline)
    twin = copy.deepcopy(scene.pipe)
    scene.check(twin)
    twin.unet = tiny("sd1").unet
    with pytest.raises(RefusedError, match="was replaced"):
        scene.draw(twin)
    scene.check(StableDiffusionPipeline.from_pipe(scene.pipe))
    conceptzap.remove(scene.pipe)
    assert type(scene.pipe) is StableDiffusionPipeline and scene.draw().equal(scene.plain)


def test_after_a_refusal_it_can_be_applied_to_the_new_unet(scene: Scene) -> None:
    before = conceptzap.applied(scene.pipe)
    scene.pipe.unet = tiny("sd1").unet
    drawn_or_refused(scene, {})
    conceptzap.apply(scene.pipe, scene.erasure)
    scene.check()
    before[0].remove()
    scene.check()
    conceptzap.remove(scene.pipe)
    assert scene.draw().equal(scene.plain)


RECORDERS = {
    "trace": lambda unet, given: torch.jit.trace(unet, given, strict=False, check_trace=False),
    "export": lambda unet, given: torch.export.export(unet, given, strict=False),
    "strict export": lambda unet, given: torch.export.export(unet, given, strict=True),
    "script": lambda unet, given: torch.jit.script(unet),  # diffusers' UNets are beyond it by themselves
}


@pytest.mark.parametrize("name", sorted(RECORDERS))
def test_a_unet_that_is_recorded_is_refused(scene: Scene, name: str) -> None:
    """What is recorded for a prompt whose gate is shut would draw the concept for any other."""
    states = scene.base.encode([NEUTRAL]).states
    given = (scene.base.noise([0]), torch.tensor(5), states)
    # dynamo tells of the raise in its own words
    match = {"script": None, "strict export": "of an erased UNet|refuse_recording"}.get(name, "of an erased")
    with pytest.raises(Exception, match=match) as caught, torch.no_grad():
        RECORDERS[name](scene.pipe.unet, given)
    if name in ("trace", "export"):
        assert isinstance(caught.value, RefusedError) and caught.value.hint
    scene.check()


# handles once more


def test_a_handle_is_a_context_manager() -> None:
    scene = Scene("sd1")
    with conceptzap.apply(scene.pipe, scene.erasure) as handle:
        scene.check()
        assert conceptzap.applied(scene.pipe) == (handle,)
    assert scene.draw().equal(scene.plain) and some.hooks(scene.base) == 0
    with pytest.raises(KeyError), conceptzap.apply(scene.pipe, scene.erasure):
        raise KeyError
    assert scene.draw().equal(scene.plain) and conceptzap.applied(scene.pipe) == ()
    conceptzap.remove(scene.pipe)


def test_a_handle_is_turned_down_and_off() -> None:
    scene = Scene("sd1")
    handle = conceptzap.apply(scene.pipe, scene.erasure, 0.5)
    half = scene.draw()
    handle.strength = 1
    scene.check()
    handle.strength = 0.5
    assert scene.draw().equal(half) and handle.strength == 0.5
    handle.disable()
    assert scene.draw().equal(scene.plain) and "disabled" in repr(handle)
    handle.enable()
    assert scene.draw().equal(half)
    for wrong in (3, -1, "1", None, float("nan"), True):
        with pytest.raises(conceptzap.ConceptZapError, match="out of range"):
            handle.strength = wrong
    assert scene.draw().equal(half) and handle.strength == 0.5
    handle.remove()
    assert scene.draw().equal(scene.plain) and "removed" in repr(handle)


def test_what_apply_takes() -> None:
    scene = Scene("sd1")
    with conceptzap.apply(scene.pipe, scene.erasure, 0.5):
        half = scene.draw()
    pair = (scene.erasure, 0.5)
    for given in (pair, [pair]):
        with conceptzap.apply(scene.pipe, given):
            assert scene.draw().equal(half)
    with conceptzap.apply(scene.pipe, (scene.erasure, 1.0), 0.5):
        assert scene.draw().equal(half)
    with pytest.raises(conceptzap.ConceptZapError, match="out of range"):
        conceptzap.apply(scene.pipe, (scene.erasure, 2.0), 2.0)
    assert some.hooks(scene.base) == 0


def test_attached_inside_an_applied_pipeline_is_refused(scene: Scene) -> None:
    for unet in (scene.pipe.unet, torch.compile(scene.pipe.unet, backend="eager")):
        with pytest.raises(RefusedError, match="already"), attached(unet, [some.adapter(scene.base)]):
            pass
    scene.check()


def test_the_receipt_counts_what_the_pipeline_drew() -> None:
    scene = Scene("sd1")
    handle = conceptzap.apply(scene.pipe, scene.erasure)
    scene.draw(prompt=MIXED)
    receipt = handle.receipt
    receipt.verify(2)
    assert receipt.rows == 16 and all(sorted(t.opened) == [4, 6] for t in receipt.tallies)
    handle.remove()
    assert handle.receipt is None


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_removing_restores_every_bit(family: str) -> None:
    scene = Scene(family)
    weights = {name: value.clone() for name, value in scene.pipe.unet.state_dict().items()}
    handle = conceptzap.apply(scene.pipe, scene.erasure)
    assert scene.draw().equal(scene.erased)
    handle.remove()
    assert scene.draw().equal(scene.plain)
    assert all(value.equal(weights[name]) for name, value in scene.pipe.unet.state_dict().items())
    assert np.isfinite(scene.plain.numpy()).all() and some.hooks(scene.base) == 0
