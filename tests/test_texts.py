"""Edits of the text encoders: laws, and that a picture is refused whose text they have not made."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import edits as some
import pytest
import torch

import conceptzap
from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Gate
from conceptzap.errors import MismatchError, RefusedError, SilentEditError
from conceptzap.evaluation.probes import Subject
from conceptzap.redteam.victim import Victim
from conceptzap.result import Settings
from conceptzap.runtime import ops, sampler, texts
from conceptzap.runtime.attach import Attachment, attached
from conceptzap.trust import canary

LOOK = Settings(steps=2, guidance=2.0)
FORMS = ("up", "into", "delta")


def of_all(base: Base) -> list[Edit]:
    """An edit in every text encoder, one of them of its words."""
    layers = [some.in_text(base, f"text.{n}.*.0.*.fc1") for n in range(1, len(base.text_encoders) + 1)]
    return [*layers, some.in_text(base, some.TABLE)]


def test_sites_of_text_encoders_are_found_and_named(base: Base) -> None:
    found = base.sites("text.*.self_attn.q_proj")
    layers = [f"text.{n}.encoder.layers.{i}.self_attn.q_proj"
              for n in range(1, len(base.text_encoders) + 1) for i in (0, 1)]
    assert list(found) == layers and base.sites("text.1.embeddings.token_embedding")
    assert all(isinstance(base.module(site), torch.nn.Linear) for site in found)
    assert set(base.fingerprint(found)) == {"attn2", "text"}
    with pytest.raises(MismatchError, match="no module text.3"):
        base.module("text.3.encoder.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("pattern", "form"),
    [("text.*.0.*.fc1", "up"), ("text.*.0.*.fc1", "keep"), ("text.*.0.*.q_proj", "into"),
     ("text.*.0.*.q_proj", "delta"), *((some.TABLE, form) for form in FORMS)],
)
def test_attached_is_the_weight_it_makes(base: Base, pattern: str, form: str) -> None:
    """What is attached equals an encoder with the weight itself changed: bake = attach."""
    edit = replace(some.in_text(base, pattern, form=form), scale=0.5)
    site = edit.sites[0]
    baked = replace(base, text_encoders=copy.deepcopy(base.text_encoders))
    layer = baked.module(site)
    layer.weight.data += ops.weight_delta([edit], base.module(site))
    with attached(base, [edit]):
        found = base.encode(some.ASKED)
        base.eps(base.noise([0]), 500, found[0])
    wanted = baked.encode(some.ASKED)
    plain = base.encode(some.ASKED)
    assert some.far(found.states, wanted.states) < 2e-5 < 1e-3 < some.far(plain.states, wanted.states)
    if wanted.pooled is not None:
        assert some.far(found.pooled, wanted.pooled) < 2e-5


def test_added_words_are_left_as_they_are(sd1: Base) -> None:
    """Textual inversion appends rows to the table, which no erasure knew of."""
    edit = some.in_text(sd1, some.TABLE)
    grown = replace(sd1, text_encoders=copy.deepcopy(sd1.text_encoders))
    (encoder,) = grown.text_encoders
    count = len(encoder.get_input_embeddings().weight)
    encoder.resize_token_embeddings(count + 2, mean_resizing=False)
    table = encoder.get_input_embeddings()
    ids = torch.tensor([[0, count, count + 1, 3]])
    plain = table(ids)
    with Watching(table) as seen, attached(grown, [edit]):
        grown.eps(grown.noise([0]), 500, grown.encode_ids([ids.repeat(1, 4)]))
    (found,) = seen
    assert found[:, 1:3].equal(plain[:, 1:3]) and not torch.allclose(found[:, [0, 3]], plain[:, [0, 3]])


class Watching:
    """The outputs of a module, as they leave it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.seen = module, []

    def __enter__(self) -> list[torch.Tensor]:
        original = self.module.__class__.__call__
        self.kind = self.module.__class__

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(module, *args, **kwargs)
            self.seen.append(output[:, :4])
            return output

        self.module.__class__ = type("Seen", (self.kind,), {"__call__": call})
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.module.__class__ = self.kind


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_the_sampler_encodes_all_it_draws_with_under_the_edits(base: Base, negative: str) -> None:
    settings = replace(LOOK, negative=negative)
    edits = of_all(base)
    (drawn,) = sampler.drawings(base, ["a cat"], [1], settings, edits)
    assert {edit.name for edit in edits} == drawn.fired
    baked = replace(base, text_encoders=copy.deepcopy(base.text_encoders))
    for site in dict.fromkeys(site for edit in edits for site in edit.sites):
        here = [edit for edit in edits if site in edit.sites]
        baked.module(site).weight.data += ops.weight_delta(here, base.module(site))
    wanted = sampler.draw(baked, ["a cat"], [1], settings)[0]
    assert (drawn.picture.int() - wanted.int()).abs().max() <= 1
    assert not drawn.picture.equal(sampler.draw(base, ["a cat"], [1], settings)[0])


def test_rows_of_zeros_are_accounted_for_as_shut(sdxl: Base) -> None:
    edit = some.in_text(sdxl)
    with attached(sdxl, [edit]) as receipt:
        cond = sdxl.encode(["a cat"])
        both = type(cond).cat([cond.zeroed(), cond])
        sdxl.eps(sdxl.noise([0, 0]), 500, both)
    (tally,) = receipt.tallies
    assert (dict(tally.opened), tally.shut) == ({1: 1}, 1)


def test_states_from_elsewhere_are_refused(base: Base) -> None:
    """Encoded before, weighted, or of another encoder: the edit has not run on them."""
    edits, before = of_all(base), base.encode(["a cat"])
    with attached(base, edits):
        made = base.encode(["a cat"])
        base.eps(base.noise([0]), 500, made)
        parts = [before, replace(made, states=1.1 * made.states)]
        if made.pooled is not None:
            parts.append(replace(made, pooled=before.pooled))
        for cond in parts:
            with pytest.raises(RefusedError, match="did not make"):
                base.eps(base.noise([0]), 500, cond)
        long = replace(made, states=torch.cat([made.states, base.encode(["a dog"]).states], 1))
        base.eps(base.noise([0]), 500, long)  # a long prompt, by its parts
    with attached(base, edits):  # by the same edits, if in another block
        base.eps(base.noise([0]), 500, made)
    with pytest.raises(RefusedError), attached(base, [edit.scaled(0.5) for edit in edits]):
        base.eps(base.noise([0]), 500, made)
    base.eps(base.noise([0]), 500, made)  # the base itself takes any


def test_earlier_states_behind_the_last_norm_are_its_own(sd1: Base) -> None:
    """As diffusers' `clip_skip` takes them."""
    norm, ids = sd1.module("text.1.final_layer_norm"), sd1.token_ids(["a cat"])[0]
    before = sd1.text_encoders[0](ids, output_hidden_states=True).hidden_states[-2]
    with attached(sd1, [some.in_text(sd1)]):
        skipped = sd1.text_encoders[0](ids, output_hidden_states=True).hidden_states[-2]
        sd1.eps(sd1.noise([0]), 500, Cond(norm(skipped)))
        with pytest.raises(RefusedError, match="did not make"):
            sd1.eps(sd1.noise([0]), 500, Cond(norm(before)))


def test_a_layer_that_is_stripped_or_never_run_is_found(base: Base) -> None:
    edit, before = some.in_text(base), some.hooks(base)
    with pytest.raises(SilentEditError, match="never run"), attached(base, [edit]):
        pass
    attachment, module = Attachment(base, [edit]), base.module(edit.sites[0])
    held = dict(module._forward_hooks)
    module._forward_hooks.clear()
    try:
        with pytest.raises(SilentEditError, match="did not run"):
            base.encode(["a cat"])
    finally:
        module._forward_hooks.update(held)
        attachment.remove()
    assert some.hooks(base) == before
    with attached(base, [edit]):  # texts alone may be what somebody wants
        base.encode(["a cat"])


def test_what_cannot_be_in_a_text_encoder_is_refused(sd1: Base) -> None:
    good, window, before = some.in_text(sd1), Gate("window", {"low": 0, "high": 500}), some.hooks(sd1)
    norm = sd1.sites("text.*.final_layer_norm")
    mixed = (*good.sites, sd1.sites("unet.*.ff.net.2")[0])
    for edit in (
        replace(good, gates=(window,)), replace(good, sites=norm), replace(good, sites=mixed),
        replace(good, params={"rows": "conditional"}), replace(some.adapter(sd1), sites=good.sites),
        some.in_text(sd1, some.TABLE, form="keep"),
        replace(some.in_text(sd1, some.TABLE), sites=sd1.sites("text.*.position_embedding")),
    ):  # fmt: skip
        with pytest.raises(MismatchError):
            Attachment(sd1, [edit])
    with pytest.raises(MismatchError, match="no module"):
        Attachment(sd1.unet, [good])
    assert some.hooks(sd1) == before


def test_its_self_test_and_its_file(base: Base) -> None:
    erasure = some.erasure(base, [*of_all(base), some.shared(base)])
    canary.check(base, erasure)
    (test,) = erasure.header.canary.values()
    assert all(value > 0 for value in test["change"].values())
    assert {site for edit in erasure.edits for site in edit.sites} == set(test["change"])


# somebody else's pipeline


def drawn(pipe: Any, **given: Any) -> torch.Tensor:
    given = {"prompt": "a cat"} | given
    generator = torch.Generator().manual_seed(3)
    return pipe(num_inference_steps=2, output_type="latent", generator=generator, **given).images


@pytest.fixture
def pipe(base: Base) -> Any:
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_on_a_pipeline_prompts_are_read_by_the_erased_encoder(base: Base, pipe: Any) -> None:
    erasure, before = some.erasure(base, of_all(base)), some.hooks(base)
    plain = drawn(pipe)
    with conceptzap.apply(pipe, erasure) as handle:
        found = drawn(pipe, negative_prompt="a dog")
        assert handle.receipt.fired() == {edit.name for edit in erasure.edits}
        assert drawn(pipe, num_images_per_prompt=2)[:1].shape == found.shape
        if base.family == "sdxl":  # for the others this diffusers looks for a part that is no longer there
            drawn(pipe, clip_skip=1)
    assert not found.equal(plain) and drawn(pipe).equal(plain) and some.hooks(base) == before


def test_on_a_pipeline_embeddings_from_elsewhere_are_refused(base: Base, pipe: Any) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def encoded() -> dict[str, Any]:
        found = pipe.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        return dict(zip(names, found, strict=False))

    before = encoded()
    with conceptzap.apply(pipe, some.erasure(base, of_all(base))):
        with pytest.raises(RefusedError, match="did not make"):
            drawn(pipe, prompt=None, **before)
        drawn(pipe, prompt=None, **encoded())
    drawn(pipe, prompt=None, **before)


def test_pipelines_of_other_encoders_are_refused(sd1: Base) -> None:
    one, shared = sd1.pipeline(), some.erasure(sd1, [some.shared(sd1)])
    other = replace(sd1, text_encoders=copy.deepcopy(sd1.text_encoders)).pipeline()
    with conceptzap.apply(one, some.erasure(sd1, [some.in_text(sd1)])):
        with pytest.raises(RefusedError, match="other text encoders"):
            conceptzap.apply(other, shared)
        with pytest.raises(RefusedError, match="did not make"):
            drawn(other)


def test_whoever_attacks_has_the_edits_in_weights(sd1: Base) -> None:
    """An attacker encodes embeddings of its own, at any time; the plain base is who knows the concept."""
    text, other = some.in_text(sd1), some.shared(sd1)
    made, left = texts.baked(sd1, [text, other, replace(text, scale=0.0)])
    assert left == (other,) and made.unet is sd1.unet and texts.baked(sd1, [other]) == (sd1, (other,))
    with attached(sd1, [text]):
        wanted = sd1.encode(["a cat"]).states
    assert some.far(made.encode(["a cat"]).states, wanted) < 2e-5
    rest = {"world": None, "probes": (), "settings": LOOK, "seed": 0}
    victim = Victim.of(sd1, [text, other], Subject("style", "van gogh", ("van gogh",)), **rest)
    assert victim.knows is sd1 and victim.edits == (other,) and victim.digest != victim.taught
    assert victim.forms(("transfer", "straight-through")) == ["transfer", "straight-through"]
