"""A base as a handle: words, text states, noise, pictures, module names, identity, devices."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
import torch

from conceptzap.base import CROSS, CROSS_KV, Base, Cond, devices, from_pipeline
from conceptzap.base.bpe import clip_tokenizer
from conceptzap.errors import MismatchError, ResourceError, UsageError
from conceptzap.testing import WORDS, tiny

ZERO_SNR = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False,
}  # fmt: skip
SENTENCES = ["a photo of a cat", "van gogh, in oil", ""]


# -- words -------------------------------------------------------------------------------------


def test_clip_tokenizer_is_clips() -> None:
    clip = clip_tokenizer()
    assert len(clip) == 49408
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip("A  PHOTO of a\tcat", add_special_tokens=False).input_ids == [
        320,
        1125,
        539,
        320,
        2368,
    ]
    assert clip("hello world!").input_ids == [49406, 3306, 1002, 256, 49407]
    assert clip.unk_token_id not in clip("кошка 🐱", add_special_tokens=False).input_ids
    padded = clip_tokenizer("!")("cat", padding="max_length").input_ids
    assert padded[:4] == [49406, 2368, 49407, 0] and len(padded) == 77


def test_small_vocabularies_know_their_words_only(sd1: Base) -> None:
    assert sd1.unknown_words("a photo of a cat") == []
    unknown = sd1.unknown_words("A zebra, a кошка and a 🐱 with a cat. Zebra!")
    assert unknown == ["zebra", "кошка", "🐱"]
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
    torch.testing.assert_close(
        (latents - (1 - a).sqrt() * eps) / a.sqrt(), x0, atol=1e-3, rtol=1e-3
    )


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
    torch.testing.assert_close(
        drawn, before.sqrt() * x0 + (1 - before).sqrt() * eps, atol=1e-5, rtol=1e-4
    )


def test_noise_where_there_is_no_signal() -> None:
    """At the end of a schedule of zero terminal SNR the latents are noise and nothing else."""
    base = replace(tiny("sd2"), scheduler_config=ZERO_SNR)
    assert base.alphas[-1] == 0
    latents = base.noise([0])
    assert base.eps(latents, 999, base.encode(["cat"])).equal(latents)


def test_the_second_encoder_of_sdxl_may_read_another_prompt(sdxl: Base) -> None:
    cond = sdxl.encode(["a cat"], ["a dog"], size=(24, 16))
    pipe = sdxl.pipeline()
    states, _, pooled, _ = pipe.encode_prompt("a cat", "a dog", do_classifier_free_guidance=False)
    assert torch.equal(cond.states, states) and torch.equal(cond.pooled, pooled)
    assert cond.time_ids.tolist() == [[24, 16, 0, 0, 24, 16]]


def test_no_negative_prompt_is_what_the_pipelines_take_for_it(base: Base) -> None:
    """Zeros for SDXL, as its model_index.json may say; the empty text for the others."""
    pipe = base.pipeline()
    none = base.unconditional()
    if base.family != "sdxl":
        assert torch.equal(none.states, pipe.encode_prompt("", "cpu", 1, False)[0])
        return
    _, states, _, pooled = pipe.encode_prompt("a cat")
    assert torch.equal(none.states, states) and torch.equal(none.pooled, pooled)
    assert not none.states.any() and base.unconditional("a dog").states.any()
    assert from_pipeline(pipe).zero_negative
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert from_pipeline(pipe).unconditional().states.any()


def test_eps_lets_gradients_through(base: Base) -> None:
    shift = torch.zeros(4, requires_grad=True)
    handle = base.unet.conv_out.register_forward_hook(lambda m, x, y: y + shift[:, None, None])
    base.eps(base.noise([0]), 400, base.encode(["cat"])).sum().backward()
    handle.remove()
    assert shift.grad.abs().min() > 0


def test_decode_gives_pictures(base: Base) -> None:
    pictures = base.decode(base.noise([0, 1]))
    assert pictures.shape == (2, *base.size, 3) and pictures.dtype == torch.uint8
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


def test_textual_inversion_is_no_other_checkpoint() -> None:
    """It appends rows to the embedding table; the rows that the checkpoint brought are the same."""
    base = tiny("sd1")
    pipe = base.pipeline()
    before = from_pipeline(pipe)
    marks = before.signature, before.fingerprint([])
    pipe.load_textual_inversion({"<grain>": torch.ones(2, 32)}, token="<grain>")
    after = from_pipeline(pipe)
    table = after.text_encoders[0].get_input_embeddings().weight
    assert len(table) == before.tokenizers[0].vocab_size + 2
    assert (after.signature, after.fingerprint([])) == marks
    with torch.no_grad():
        table[5] += 1
    assert from_pipeline(pipe).fingerprint([])["text"] != marks[1]["text"]


def test_what_fused_projections_leave_behind_is_no_other_checkpoint() -> None:
    base = tiny("sd1")
    signature = base.signature
    base.unet.fuse_qkv_projections()
    assert from_pipeline(base.pipeline()).signature != signature
    base.unet.unfuse_qkv_projections()
    assert any("to_kv" in name for name, _ in base.unet.named_parameters())
    assert from_pipeline(base.pipeline()).signature == signature


def test_weights_that_are_kept_elsewhere_are_read_there() -> None:
    """Sequential offloading: on the meta device until their layer runs."""
    from accelerate import cpu_offload

    base = tiny("sdxl")
    signature, prints = base.signature, base.fingerprint(["unet.conv_in"])
    latents, cond = base.noise([0]), base.encode(["a cat"])
    seen = base.eps(latents, 300, cond)
    pipe = base.pipeline()
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        cpu_offload(part, execution_device=torch.device("cpu"))
    again = from_pipeline(pipe)
    assert next(again.unet.parameters()).is_meta and again.device.type == "cpu"
    assert (again.signature, again.fingerprint(["unet.conv_in"])) == (signature, prints)
    assert again.eps(latents, 300, again.encode(["a cat"])).equal(seen)


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


def test_half_precision_vae_that_overflows_decodes_in_full(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("sd1")
    assert base.vae.config.force_upcast
    base.vae.half()
    latents = base.noise([0])
    # diffusers' own cast warns on stderr, at every picture
    noisy = lambda *_, **__: pytest.fail("diffusers casts the VAE")  # noqa: E731
    monkeypatch.setattr(type(base.vae), "to", noisy)
    assert (base.decode(latents).int() - sd1.decode(latents).int()).abs().max() <= 1
    assert base.vae.dtype == torch.float16


def test_the_tests_have_no_network() -> None:
    for address in (("192.0.2.1", 80), ("huggingface.co", 443)):
        with pytest.raises(OSError, match="reached for the network"):
            socket.create_connection(address, timeout=1)
