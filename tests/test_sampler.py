"""The denoising loop: equal to diffusers', one generator a picture, no picture without a receipt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import edits as some
import pytest
import torch

from conceptzap.base import Base
from conceptzap.errors import ResourceError, SilentEditError, UsageError
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.attach import Receipt
from conceptzap.runtime.sampler import denoise, draw, drawings
from conceptzap.testing import tiny

SHORT = Settings(steps=2, guidance=4.0)
PROMPTS = [some.ASKED[0], some.OTHER[1], some.ASKED[1], some.OTHER[0]]
SEEDS = [3, 5, 3, 2**63 - 1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_parity_with_diffusers(family: str, prediction: str, guidance: float) -> None:
    """The latents of StableDiffusionPipeline with DDIMScheduler, from the same noise."""
    base = tiny(family, prediction)
    noise = base.noise([7, 8])
    settings = Settings(steps=5, guidance=guidance, negative="a red car")
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=PROMPTS[:2],
        negative_prompt=["a red car"] * 2,
        latents=noise,
        num_inference_steps=5,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    ours = list(denoise(base, base.encode(PROMPTS[:2]), base.encode(["a red car"]), settings, noise))
    assert [t for t, _ in ours][-1] == -1 and len(ours) == 6
    assert some.far(ours[-1][1].detach(), theirs) < 1e-4


def theirs_and_ours(base: Base, pipe: Any, settings: Settings, **given: Any) -> tuple[Any, Any]:
    """Latents of a diffusers pipeline and of our loop, from the same noise and prompts."""
    size = sampler.size_of(base, settings)
    noise, prompts = base.noise([7, 8], size), PROMPTS[:2]
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=prompts,
        negative_prompt=[settings.negative] * 2 if settings.negative else None,
        latents=noise,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=size[0],
        width=size[1],
        output_type="latent",
        **given,
    ).images
    uncond = base.unconditional(settings.negative, size)
    trail = denoise(base, base.encode(prompts, size=size), uncond, settings, noise)
    with torch.no_grad():
        return theirs, list(trail)[-1][1]


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_parity_of_samplers(name: str, zero_snr: bool) -> None:
    """Also of a schedule that ends without signal, which only steps in v can leave."""
    base = tiny("sd2")
    if zero_snr:
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        base = replace(base, scheduler_config=base.scheduler_config | changes)
    pipe = base.pipeline()
    pipe.scheduler = base.scheduler(name)
    theirs, ours = theirs_and_ours(base, pipe, Settings(steps=5, guidance=5.0, scheduler=name))
    assert ours.isfinite().all() and some.far(ours, theirs) < 1e-4


@pytest.mark.parametrize("look", [{}, {"negative": "a red car"}, {"height": 24, "width": 16}, {"guidance": 0.5}])
def test_parity_with_sdxl(sdxl: Base, look: dict[str, Any]) -> None:
    """Zeros for no negative prompt, sizes as they are drawn, guidance up to 1 is none."""
    settings = replace(Settings(steps=5, guidance=5.0), **look)
    theirs, ours = theirs_and_ours(sdxl, sdxl.pipeline(), settings)
    assert some.far(ours, theirs) < 1e-4


def test_parity_with_inpainting() -> None:
    """Where all is to be painted, over a grey picture."""
    base = tiny("sd1", channels=9)
    grey = base._grey(8, 8)
    settings = Settings(steps=4, guidance=5.0)
    image = {"image": torch.zeros(2, 3, 16, 16), "mask_image": torch.ones(2, 1, 16, 16)}
    theirs, ours = theirs_and_ours(
        base, base.pipeline(), settings, **image, strength=1.0, masked_image_latents=grey
    )
    assert some.far(ours, theirs) < 1e-4
    assert draw(base, PROMPTS, SEEDS, SHORT).shape == (4, *base.size, 3)


BARE = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverSDEScheduler")  # fmt: skip


@pytest.mark.parametrize("name", BARE)
def test_configs_of_other_schedulers_do_not_mean_what_ddim_would(sd1: Base, name: str) -> None:
    """A picture is not clipped where nobody said so; what is said holds."""
    config = {"_class_name": name, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    known = replace(sd1, scheduler_config=config).scheduler().config
    assert not known.clip_sample and not known.set_alpha_to_one
    assert (known.steps_offset, known.timestep_spacing) == (1, "leading")
    assert draw(replace(sd1, scheduler_config=config), PROMPTS[:1], [0], SHORT).equal(
        draw(sd1, PROMPTS[:1], [0], SHORT)
    )
    said = replace(sd1, scheduler_config=config | {"timestep_spacing": "trailing", "steps_offset": 0})
    assert said.scheduler().config.timestep_spacing == "trailing"


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_up_to_1_is_none(sd1: Base, guidance: float) -> None:
    plain = draw(sd1, PROMPTS[:2], [0, 1], replace(SHORT, guidance=1.0))
    assert draw(sd1, PROMPTS[:2], [0, 1], replace(SHORT, guidance=guidance)).equal(plain)


def test_pictures_of_another_size(base: Base) -> None:
    drawn = draw(base, PROMPTS, SEEDS, replace(SHORT, height=24, width=8), some.eraser(base))
    assert drawn.shape == (4, 24, 8, 3)
    assert "height" not in SHORT.record() and replace(SHORT, height=24).record()["height"] == 24
    for wrong in ({"height": 4}, {"width": 100}, {"height": 4096}, {"scheduler": "magic"}):
        with pytest.raises(UsageError):
            replace(SHORT, **wrong)


@pytest.mark.parametrize("edited", [False, True])
def test_a_picture_does_not_depend_on_its_neighbours(base: Base, edited: bool) -> None:
    """One picture a call: the same bits alone, first, last, and after any other."""
    edits = some.eraser(base) if edited else ()
    together = draw(base, PROMPTS, SEEDS, SHORT, edits)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        assert draw(base, [prompt], [seed], SHORT, edits)[0].equal(together[i])
    backwards = draw(base, PROMPTS[::-1], SEEDS[::-1], SHORT, edits)
    assert backwards.flip(0).equal(together)


def test_batches_agree_within_rounding(base: Base) -> None:
    edits = some.eraser(base)
    one_by_one = draw(base, PROMPTS, SEEDS, SHORT, edits)
    for batch in (3, 4, 9):
        batched = draw(base, PROMPTS, SEEDS, replace(SHORT, batch=batch), edits)
        assert (batched.int() - one_by_one.int()).abs().max() <= 1


def test_one_generator_a_picture(sd1: Base) -> None:
    """The global generator neither matters nor moves."""
    torch.manual_seed(1)
    first, state = draw(sd1, PROMPTS[:1], [4], SHORT), torch.get_rng_state()
    torch.manual_seed(2)
    assert draw(sd1, PROMPTS[:1], [4], SHORT).equal(first)
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)
    own = torch.Generator("cpu").manual_seed(4)
    assert sd1.noise([9, 4])[1].equal(torch.randn(sd1.latent_shape, generator=own))


def test_unrelated_pictures_keep_their_bits(base: Base) -> None:
    edits, others = some.eraser(base), list(some.OTHER)
    seeds = list(range(len(others)))
    drawn = list(drawings(base, others, seeds, SHORT, edits))
    assert torch.stack([d.picture for d in drawn]).equal(draw(base, others, seeds, SHORT))
    assert not any(d.fired for d in drawn)


@pytest.mark.parametrize("batch", [1, 4])
def test_says_for_each_picture_what_fired(sd1: Base, batch: int) -> None:
    edits = some.eraser(sd1)
    drawn = drawings(sd1, PROMPTS, SEEDS, replace(SHORT, batch=batch), edits)
    names = {edit.name for edit in edits}
    assert [set(d.fired) for d in drawn] == [names, set(), names, set()]
    negative = replace(SHORT, batch=batch, negative=some.ASKED[0])
    assert all(d.fired == names for d in drawings(sd1, PROMPTS, SEEDS, negative, edits))


def test_the_negative_prompt_is_left_out_at_guidance_1(sd1: Base) -> None:
    settings = Settings(steps=2, guidance=1.0)
    named = replace(settings, negative=some.ASKED[0])
    assert draw(sd1, PROMPTS, SEEDS, named).equal(draw(sd1, PROMPTS, SEEDS, settings))
    assert not next(drawings(sd1, [some.OTHER[0]], [0], named, some.eraser(sd1))).fired


def test_no_picture_without_its_receipt(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(type(sd1), "decode", lambda *given: decoded.append(given))
    monkeypatch.setattr(sampler, "denoise", lambda *given: iter([*denoise(*given), (-1, given[-1])]))
    with pytest.raises(SilentEditError, match="3 UNet calls were made but the edits saw 2"):
        draw(sd1, PROMPTS[:1], [0], SHORT, some.eraser(sd1))
    assert not decoded


def test_a_receipt_that_lost_rows_is_refused(sd1: Base) -> None:
    receipt = Receipt(some.eraser(sd1), calls=2, rows=4)
    with pytest.raises(SilentEditError, match="accounts for 0 of 4 rows"):
        receipt.verify(2)


def test_a_hook_lost_on_the_way_ends_the_drawing() -> None:
    """The UNet is fused between two pictures of one run; that leaves weights behind, so it is one of its own."""
    base = tiny("sd1")
    drawn = drawings(base, PROMPTS, SEEDS, SHORT, some.eraser(base))
    next(drawn)
    base.unet.fuse_qkv_projections()
    try:
        with pytest.raises(SilentEditError):
            next(drawn)
    finally:
        base.unet.unfuse_qkv_projections()
    assert draw(base, PROMPTS, SEEDS, SHORT).shape == (4, *base.size, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused(sd1: Base, value: float) -> None:
    edit = some.shared(sd1)
    broken = replace(edit, tensors={slot: torch.full_like(t, value) for slot, t in edit.tensors.items()})
    with pytest.raises(ResourceError, match="not finite") as caught:
        draw(sd1, PROMPTS, SEEDS, SHORT, [broken])
    assert caught.value.exit_code == 5


def test_whoever_leaves_early_leaves_nothing_behind(sd1: Base) -> None:
    hooks = some.hooks(sd1)
    drawn = drawings(sd1, PROMPTS, SEEDS, SHORT, some.eraser(sd1))
    next(drawn)
    drawn.close()
    trail = denoise(sd1, sd1.encode(["a cat"]), sd1.encode([""]), SHORT, sd1.noise([0]))
    assert next(trail)[1].equal(sd1.noise([0]))
    trail.close()
    assert some.hooks(sd1) == hooks
