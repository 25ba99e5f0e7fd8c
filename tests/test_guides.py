"""Guides: what they do to the guidance term, in our sampler and through diffusers' own pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import edits as some
import numpy as np
import pytest
import torch
from torch import Tensor

from conceptzap import exports, format
from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Erasure, Header, sort_edits
from conceptzap.errors import FormatError, MismatchError, RefusedError
from conceptzap.result import Settings
from conceptzap.runtime import guides, sampler
from conceptzap.runtime.attach import Attachment, attached
from conceptzap.trust import canary

PROMPT, SEED = "a painting of a cat", 3
LOOK = Settings(steps=3, guidance=4.0)
RULES = ("swap", "safe")


def latents(
    base: Base, edits: Any = (), look: Settings = LOOK, prompts: tuple[str, ...] = (PROMPT,)
) -> Tensor:
    """The end of a walk [n, c, h, w] under the edits."""
    noise, below = base.noise(range(SEED, SEED + len(prompts))), base.unconditional(look.negative)
    with torch.no_grad(), attached(base.unet, edits):
        return list(sampler.denoise(base, base.encode(prompts), below, look, noise))[-1][1]


def context(edit: Edit, base: Base, row: int) -> Cond:
    """A guide's own text, as something a UNet is conditioned on."""
    pooled = edit.tensors["pooled"][[row]] if "pooled" in edit.tensors else None
    return Cond(edit.tensors["context"][[row]], pooled, base.encode([PROMPT]).time_ids)


def by_hand(base: Base, edit: Edit, look: Settings = LOOK, strength: float = 1.0) -> Tensor:
    """The same walk with the published line in place of the sampler's, one UNet call a text."""
    scheduler = base.scheduler(look.scheduler)
    scheduler.set_timesteps(look.steps)
    given, below = base.encode([PROMPT]), base.unconditional(look.negative)
    x, momentum = base.noise([SEED]) * scheduler.init_noise_sigma, torch.zeros(1)
    for t in scheduler.timesteps:
        conds = (below, given, context(edit, base, 0), context(edit, base, 1))
        u, c, first, second = (base.predict(x, t, cond) for cond in conds)
        u = u if look.guidance > 1 else second if edit.params["rule"] == "safe" else u
        change = second - first
        if edit.params["rule"] == "safe":
            noise = base.alphas[int(t)].sqrt() if base.prediction == "v_prediction" else 1.0
            apart = noise * (c - first)
            mu = torch.where(apart < edit.params["threshold"], (50 * apart.abs()).clamp(max=1), 0)
            gamma = mu * (first - u) + edit.params["momentum"] * momentum
            momentum = edit.params["beta"] * momentum + (1 - edit.params["beta"]) * gamma
            change = -gamma if t <= edit.params["below"] else torch.zeros(1)
        c = c + strength * change
        x = scheduler.step(u + look.guidance * (c - u) if look.guidance > 1 else c, t, x).prev_sample
    return x


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_the_sampler_draws_what_the_equation_says(base: Base, rule: str) -> None:
    edit = some.guide(base, rule)
    wanted = by_hand(base, edit)
    assert some.far(latents(base, [edit]), wanted) < 1e-4
    assert some.far(latents(base), wanted) > 1e-3
    half = latents(base, [edit.scaled(0.5)])
    assert some.far(half, by_hand(base, edit, strength=0.5)) < 1e-4


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_without_guidance_the_conditional_prediction_is_moved(sd1: Base, rule: str) -> None:
    edit, look = some.guide(sd1, rule), Settings(steps=2, guidance=1.0)
    assert some.far(latents(sd1, [edit], look), by_hand(sd1, edit, look)) < 1e-4


@torch.no_grad()
def test_before_its_start_sld_builds_up_momentum_alone(sd1: Base) -> None:
    edit = some.guide(sd1, "safe")
    late = Edit("guide", edit.sites, edit.tensors, {**edit.params, "below": 500})
    assert some.far(latents(sd1, [late]), by_hand(sd1, late)) < 1e-4
    never = Edit("guide", edit.sites, edit.tensors, {**edit.params, "below": 0})
    assert latents(sd1, [never]).equal(latents(sd1))


@torch.no_grad()
def test_guides_add_up_in_any_order_and_leave_rows_alone_that_are_shut(sd1: Base) -> None:
    pair = [some.guide(sd1, rule, gates=[some.gate(sd1)]) for rule in RULES]
    asked = (PROMPT, "a house by van gogh")
    plain, both = latents(sd1, prompts=asked), latents(sd1, pair, prompts=asked)
    assert both[0].equal(plain[0]) and not both[1].equal(plain[1])
    assert some.far(both, latents(sd1, pair[::-1], prompts=asked)) < 1e-5
    texts = torch.cat([pair[0].tensors["context"]] * 2, 1)  # 154 tokens
    long = Edit("guide", ("unet",), {"context": texts}, {"rule": "swap"})
    assert not latents(sd1, [*pair, long]).equal(latents(sd1, pair))


@torch.no_grad()
def test_texts_are_run_through_the_plain_base(sd1: Base) -> None:
    """g - f is the base's own, whatever else is attached."""
    guide, other = some.guide(sd1), some.shared(sd1)
    cond, noise = sd1.encode([PROMPT]), sd1.noise([SEED])

    def eps(*edits: Edit) -> Tensor:
        with attached(sd1.unet, edits):
            return sd1.eps(noise, 500, cond)

    assert some.far(eps(guide, other) - eps(other), eps(guide) - eps()) < 1e-4


def test_the_receipt_counts_conditional_rows(sd1: Base) -> None:
    edits = [some.guide(sd1), some.conditional(some.shared(sd1)), some.shared(sd1, seed=5)]
    with attached(sd1.unet, edits) as receipt:
        noise = sd1.noise([SEED])
        list(sampler.denoise(sd1, sd1.encode([PROMPT]), sd1.unconditional(), LOOK, noise))
    receipt.verify(LOOK.steps)
    assert [(tally.open, tally.shut) for tally in receipt.tallies] == [(3, 3), (3, 3), (6, 0)]
    assert receipt.opened[:2].tolist() == [[0, 3], [0, 3]]


@torch.no_grad()
def test_conditional_rows_only(sd1: Base) -> None:
    """The unconditional half is the plain base's, the other one the edited one's."""
    x, t, both = sd1.noise([1, 1]), 500, Cond.cat([sd1.unconditional(), sd1.encode([PROMPT])])
    plain = sd1.predict(x, t, both)
    for edit in (some.shared(sd1), some.low_rank(sd1), some.tokens(sd1), some.adapter(sd1), some.mask(sd1)):
        found = []
        for one in (edit, some.conditional(edit)):
            with attached(sd1.unet, [one]), guides.Guidance(lambda rows: rows // 2).told():
                found.append(sd1.predict(x, t, both))
        assert some.far(found[1][0], plain[0]) < 1e-5 and not some.far(found[0][0], plain[0]) < 1e-5
        assert some.far(found[1][1], found[0][1]) < 1e-5


# diffusers


def pipeline(base: Base) -> Any:
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, guidance: float = 4.0) -> np.ndarray:
    generator = torch.Generator().manual_seed(SEED)
    asked = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "latent"}
    return pipe(PROMPT, generator=generator, **asked).images


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_pipeline_draws_what_the_sampler_does(base: Base, rule: str, guidance: float) -> None:
    import conceptzap

    edit, pipe = some.guide(base, rule), pipeline(base)
    plain = drawn(pipe, guidance)
    erased = some.erasure(base, [edit])
    ours = latents(base, erased.edits, Settings(steps=2, guidance=guidance))
    with conceptzap.apply(pipe, erased) as handle:
        assert some.far(drawn(pipe, guidance), ours) < 1e-3
        assert handle.receipt.calls == 2 and handle.receipt.tallies[0].open == 2
        handle.strength = 0
        assert drawn(pipe, guidance).equal(plain)
    assert drawn(pipe, guidance).equal(plain)


def modular(base: Base, guider: Any) -> Any:
    """diffusers' modular pipeline over the same parts: a UNet call a prediction, combined by its guider."""
    from diffusers.modular_pipelines import stable_diffusion_xl

    pipe = stable_diffusion_xl.StableDiffusionXLAutoBlocks().init_pipeline()
    parts = {name: part for name, part in base.pipeline().components.items() if part is not None}
    pipe.update_components(**parts, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_modular(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(SEED)
    asked = {"num_inference_steps": 3, "generator": generator, "output_type": "latent"}
    return pipe(prompt=PROMPT, **asked).get("images")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_guider_of_diffusers_combines_what_a_guide_has_moved(
    sdxl: Base, rule: str, guidance: float
) -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    import conceptzap

    pipe = modular(sdxl, ClassifierFreeGuidance(guidance))
    plain, numbers = drawn_modular(pipe), some.guide(sdxl, rule).params
    steered = guides.guide(sdxl, rule, ["a horse", ""], {k: v for k, v in numbers.items() if k != "rule"})
    erased = some.erasure(sdxl, [steered, some.conditional(some.shared(sdxl))])
    ours = latents(sdxl, erased.edits, Settings(steps=3, guidance=guidance))
    with conceptzap.apply(pipe, erased) as handle:
        assert some.far(drawn_modular(pipe), ours) < 1e-3
        assert handle.receipt.tallies[0].open == 3  # of twice as many calls where there is guidance
        handle.strength = 0
        assert drawn_modular(pipe).equal(plain)
    assert some.far(plain, ours) > 1e-3
    assert drawn_modular(pipe).equal(plain)


@torch.no_grad()
@pytest.mark.parametrize(("guidance", "leads"), [(4.0, True), (0.5, False)])
def test_a_guider_that_draws_what_no_prompt_shows_is_not_led_away_from_it(
    sdxl: Base, guidance: float, leads: bool
) -> None:
    """Rows for the unconditional half act where guidance leads away from it, and nowhere else."""
    from diffusers.guiders import ClassifierFreeGuidance

    import conceptzap

    both = some.halved(sdxl)
    drawn = []
    for edit in (both, replace(both, tensors={"prompt": both.tensors["prompt"]})):
        pipe = modular(sdxl, ClassifierFreeGuidance(guidance))
        with conceptzap.apply(pipe, some.erasure(sdxl, [edit])) as handle:
            drawn.append(drawn_modular(pipe))
            assert handle.receipt.calls == 6
    assert (some.far(*drawn) > 1e-3) == leads


@torch.no_grad()
def test_guiders_with_predictions_of_their_own(sdxl: Base) -> None:
    from diffusers.guiders import SkipLayerGuidance

    import conceptzap

    layers = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}
    pipe = modular(sdxl, SkipLayerGuidance(4.0, skip_layer_config=layers, skip_layer_guidance_stop=1.0))
    plain = drawn_modular(pipe)
    with conceptzap.apply(pipe, some.erasure(sdxl, [some.guide(sdxl)])) as handle:
        assert some.far(drawn_modular(pipe), plain) > 1e-3
        counts = handle.receipt.calls, handle.receipt.tallies[0].open, handle.receipt.tallies[0].shut
        assert counts == (8, 5, 3)  # the layer is skipped in two of three steps; every step has a u
    assert drawn_modular(pipe).equal(plain)


def test_what_does_not_say_its_rows_is_refused(sd1: Base) -> None:
    import conceptzap

    pipe = pipeline(sd1)
    own = type("Mine", (type(pipe),), {})
    with conceptzap.apply(pipe, some.erasure(sd1, [some.guide(sd1)])):
        with pytest.raises(RefusedError, match="which rows"):
            sd1.eps(sd1.noise([0]), 500, sd1.encode([PROMPT]))
        with pytest.raises(RefusedError, match="which rows"):
            drawn(pipeline(sd1))
        assert drawn(pipe).isfinite().all()
    mine = own(**pipe.components, requires_safety_checker=False)
    gated = some.erasure(sd1, [some.guide(sd1, gates=[some.gate(sd1)])])
    with conceptzap.apply(mine, gated):
        assert drawn(mine).isfinite().all()  # the gate is shut
    with conceptzap.apply(mine, some.erasure(sd1, [some.conditional(some.shared(sd1))])):
        with pytest.raises(RefusedError, match="which rows"):
            drawn(mine)


def test_every_pipeline_named_halves_its_rows() -> None:
    import inspect

    import diffusers

    from conceptzap.verbs.applying import HALVED

    for name in HALVED:
        kind = getattr(diffusers, name)
        assert "noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)" in inspect.getsource(kind)
        assert isinstance(kind.do_classifier_free_guidance, property)


# files, canaries, exports


@pytest.mark.parametrize("rule", RULES)
def test_its_file_is_checked_and_its_canary_finds_it_missing(base: Base, rule: str, tmp_path: Any) -> None:
    erased = some.erasure(base, [some.guide(base, rule), some.shared(base)])
    format.save(erased, tmp_path / f"x{format.SUFFIX}")
    back = format.load(tmp_path / f"x{format.SUFFIX}")
    canary.check(base, back)
    (test,) = back.header.canary.values()
    assert test["change"]["unet"] > 0
    weak = {**test, "change": {**test["change"], "unet": 2 * test["change"]["unet"]}}
    forged = Header(**{**vars(back.header), "canary": {next(iter(back.header.canary)): weak}})
    with pytest.raises(RefusedError, match="self-test failed at unet"):
        canary.check(base, Erasure(forged, back.edits))


@pytest.mark.parametrize("params", [{}, {"rule": "best"}, {"rule": "safe"}, {"rule": "swap", "rows": "all"}])
def test_params_that_say_nothing_are_refused(sd1: Base, params: dict[str, str]) -> None:
    edit = Edit("guide", ("unet",), some.guide(sd1).tensors, params)
    with pytest.raises(FormatError):
        format.dumps(Erasure(some.erasure(sd1).header, sort_edits([edit])))


def test_a_guide_for_another_base_is_refused(sd1: Base, sdxl: Base) -> None:
    sound = some.guide(sd1)
    for edit in (
        some.guide(sdxl),
        Edit("guide", ("unet.mid_block",), sound.tensors, sound.params),
        Edit("guide", ("unet",), {"context": sound.tensors["context"][:1]}, sound.params),
        Edit("guide", ("unet",), {**sound.tensors, "pooled": torch.ones(2, 3)}, sound.params),
    ):
        with pytest.raises(MismatchError):
            Attachment(sd1.unet, [edit])


@pytest.mark.parametrize("to", ["lora", "checkpoint"])
def test_no_export_holds_it(sd1: Base, to: str) -> None:
    from conceptzap.registry import family

    for edit in (some.guide(sd1), some.conditional(some.shared(sd1))):
        erased = some.erasure(sd1, [edit])
        with pytest.raises(RefusedError, match="cannot hold 1 of 1 edit"):
            family.load("exports", to).check(exports.Order(erased.header, erased.edits, ()))
