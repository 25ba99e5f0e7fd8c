"""What each op adds, against the formula written out."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import edits as some
import pytest
import torch
import torch.nn.functional as F
from samples import header

from conceptzap.base import CROSS, CROSS_K, CROSS_KV, Base
from conceptzap.edit import Edit, Erasure, Gate
from conceptzap.errors import MismatchError
from conceptzap.runtime import ops
from conceptzap.runtime.attach import Attachment, attached, bake
from conceptzap.runtime.hooks import LayerHook
from conceptzap.trust import admission

PROMPTS = (some.ASKED[0], some.OTHER[1])


def at(base: Base, site: str, edits: list[Edit]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a module in a UNet call under the edits."""
    seen = []
    with attached(base.unet, edits), torch.no_grad():
        module = base.module(site)
        handles = [
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0]), prepend=True),
            module.register_forward_hook(lambda m, args, output: seen.append(output)),
        ]
        base.eps(base.noise([0, 1]), some.TIME, base.encode(PROMPTS))
        for handle in handles:
            handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_the_encodings_of_a_weight_change_agree(base: Base, scale: float) -> None:
    site = base.sites(CROSS_K)[0]
    weight = base.module(site).weight
    pair = some.shared(base).tensors
    up_down = {"up": weight @ pair["into"], "down": pair["down"]}
    change = {"delta": up_down["up"] @ up_down["down"]}
    drawn = [some.eps(base, PROMPTS, [Edit("weight", (site,), t, scale=scale)]) for t in (pair, up_down, change)]
    assert some.far(drawn[1], drawn[0]) < 1e-5 and some.far(drawn[2], drawn[0]) < 1e-5
    assert some.far(some.eps(base, PROMPTS), drawn[0]) > 1e-4


def test_a_mask_keeps_and_cuts(base: Base) -> None:
    edit = some.mask(base)
    module = base.module(edit.sites[0])
    x, y = at(base, edit.sites[0], [edit])
    assert torch.allclose(y, F.linear(x, module.weight * edit.tensors["keep"], module.bias), atol=1e-5)


def overlapping(base: Base, pattern: str) -> list[Edit]:
    """Two masks that prune about an eighth of the weights both."""
    made = [some.mask(base, pattern, seed=seed) for seed in (0, 1)]
    assert not (made[0].tensors["keep"] | made[1].tensors["keep"]).all()
    return made


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("pattern", [some.FEED, some.CONVS])
def test_masks_multiply(sd1: Base, pattern: str, scales: tuple[float, float]) -> None:
    """What two masks prune is pruned once, never turned into -W; baked or attached."""
    made = [replace(m, scale=s) for m, s in zip(overlapping(sd1, pattern), scales, strict=True)]
    module = sd1.module(made[0].sites[0])
    kept = [1 + m.scale * (m.tensors["keep"].float() - 1) for m in made]
    weight = module.weight * kept[0] * kept[1]
    x, y = at(sd1, made[0].sites[0], made)
    run = F.linear if pattern == some.FEED else partial(F.conv2d, stride=module.stride, padding=module.padding)
    assert torch.allclose(y, run(x, weight, module.bias), atol=1e-5)
    assert torch.allclose(module.weight + ops.weight_delta(made, module), weight, atol=1e-6)
    assert torch.allclose(bake(sd1.unet, made)[f"{made[0].sites[0][5:]}.weight"], weight, atol=1e-6)


def test_masks_multiply_row_by_row(sd1: Base) -> None:
    """One behind a gate, one on a curve of time: every row has a product of its own."""
    one, two = overlapping(sd1, some.FEED)
    times = {"times": torch.tensor([0.0, 1000.0]), "values": torch.tensor([0.0, 1.0])}
    gated = replace(one, gates=(some.gate(sd1),))
    fading = replace(two, gates=(Gate("curve", {}, times),))
    latents, cond = sd1.noise(range(4)), sd1.encode([*PROMPTS, *PROMPTS])
    t = torch.tensor([900, 900, 0, 0])
    with attached(sd1.unet, [gated, fading, some.delta(sd1)]), torch.no_grad():
        mixed = sd1.eps(latents, t, cond)
    for row in range(4):
        alone = [some.delta(sd1), replace(two, scale=t[row].item() / 1000)]
        alone += [one] if row % 2 == 0 else []
        with attached(sd1.unet, alone), torch.no_grad():
            assert some.far(mixed[[row]], sd1.eps(latents[[row]], int(t[row]), cond[row])) < 1e-5


@pytest.mark.parametrize("pattern", [some.FEED, some.CONVS, CROSS_K])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.5, 1.0, 0.25)])
def test_masks_of_every_form_multiply(base: Base, pattern: str, scales: tuple[float, ...]) -> None:
    """Over input features, over weights, packed: what several cut is cut once, beside a change of the input."""
    makers = (some.columns, some.mask, some.packed)
    made = [
        replace(maker(base, pattern, seed=seed), scale=scale)
        for seed, (maker, scale) in enumerate(zip(makers, scales, strict=True))
    ]
    module, (site,) = base.module(made[0].sites[0]), made[0].sites
    whole = [made[0].tensors["keep"].view(1, -1, *(1,) * (module.weight.ndim - 2)), made[1].tensors["keep"]]
    whole.append(some.mask(base, pattern, seed=2).tensors["keep"])
    kept = [1 + m.scale * (k.float() - 1) for m, k in zip(made, whole, strict=True)]
    weight = module.weight * kept[0] * kept[1] * kept[2]
    x, y = at(base, site, made)
    conv = {"stride": module.stride, "padding": module.padding} if pattern == some.CONVS else {}
    run = F.conv2d if conv else F.linear
    assert torch.allclose(y, run(x, weight, module.bias, **conv), atol=1e-5)
    assert torch.allclose(module.weight + ops.weight_delta(made, module), weight, atol=1e-6)


def test_a_mask_over_features_cuts_them_whatever_the_weights(base: Base) -> None:
    """Exactly the layer on an input with zeros there, gated row by row; all else keeps its bits."""
    edit = some.columns(base, gates=[some.gate(base)])
    (site,), module = edit.sites, base.module(edit.sites[0])
    x, y = at(base, site, [edit])
    with torch.no_grad():
        assert y[0].equal(module(x * edit.tensors["keep"])[0])
        assert y[1].equal(module(x)[1])


def test_bits_are_unpacked_as_they_were(base: Base) -> None:
    for shape in ((3, 8), (5, 13), (2, 3, 3, 3), (1, 1)):
        keep = some.randn(*shape) > 0
        bits = ops.pack(keep)
        assert bits.dtype == torch.uint8 and bits.shape == (shape[0], -(-keep[0].numel() // 8))
        assert ops.unpack(bits, shape).equal(keep)


@pytest.mark.parametrize("maker", [some.low_rank, some.shared, partial(some.low_rank, pattern=some.CONVS)])
def test_pairs_are_one_along_the_rank(sd1: Base, maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten low-rank files cost one pair of products, each at its own strength, in any order."""
    made = [replace(maker(sd1, seed=seed), scale=0.1 + 0.2 * seed) for seed in range(9)]
    gated = replace(maker(sd1, seed=20), gates=(some.gate(sd1),))
    ran, low_rank = [], ops.low_rank
    monkeypatch.setattr(ops, "low_rank", lambda *given: ran.append(given) or low_rank(*given))
    fused = some.eps(sd1, PROMPTS, [*made, gated])
    assert len({id(given[0].down) for given in ran}) == 1 and len(ran[0][0].ranks) == 10
    sums = [replace(m, tensors=m.tensors | {"down": m.scale * m.tensors["down"]}, scale=1.0) for m in made]
    monkeypatch.setattr(LayerHook, "_low_rank", _one_by_one)
    assert some.far(some.eps(sd1, PROMPTS, [*sums, gated]), fused) < 1e-5
    monkeypatch.undo()
    assert some.far(some.eps(sd1, PROMPTS, [gated, *made[::-1]]), fused) < 1e-5


def _one_by_one(hook: LayerHook, call: Any, indices: tuple, up: str, module: Any, x: torch.Tensor) -> Any:
    total: Any = 0
    for index in indices:
        pair = hook.ledger.pair((index,), up, x)
        total = total + ops.low_rank(pair, call.strength((index,), x, pair.ranks), module, x)
    return total


MAKERS = (some.tokens, some.key_values, some.shared, some.low_rank, some.delta, some.mask, some.adapter)


@pytest.mark.parametrize("maker", MAKERS)
def test_an_overflow_behind_a_shut_gate_stays_there(sd1: Base, maker: Any) -> None:
    """A row of a mixed call that is shut is finite and the base's, whatever the edit would give it."""
    edit = maker(sd1, gates=[some.gate(sd1)])
    # of a pair the product with `down` is what overflows; its `up` and `into` are finite in every file
    slots = {"down"} if edit.op == "weight" and "down" in edit.tensors else set(edit.tensors)
    wild = {s: torch.full(edit.tensors[s].shape, torch.inf) for s in slots}
    mixed = some.eps(sd1, PROMPTS, [replace(edit, tensors=edit.tensors | wild)])
    plain = some.eps(sd1, PROMPTS)
    assert not mixed[0].isfinite().all()
    assert some.far(mixed[[1]], plain[[1]]) < 1e-5


def test_placed_once(sd1: Base) -> None:
    """Tensors in another dtype than the UNet's are cast once, not at every module of every call."""
    base = replace(sd1, unet=copy.deepcopy(sd1.unet).bfloat16(), dtype=torch.bfloat16)
    edits = [some.tokens(base), some.shared(base), some.low_rank(base), some.adapter(base)]
    attachment = Attachment(base.unet, edits)
    seen = []
    for _ in range(2):
        with torch.no_grad():
            base.eps(base.noise([0]), some.TIME, base.encode([PROMPTS[0]]))
        parts = attachment._ledger.parts
        seen.append([{key: id(value) for key, value in part._placed.items()} for part in parts])
    attachment.remove()
    assert seen[0] == seen[1] and [len(placed) for placed in seen[0]] == [2, 2, 2, 4]


@pytest.mark.parametrize("maker", [some.low_rank, some.delta, some.mask])
def test_convolutions(base: Base, maker: object) -> None:
    edit = maker(base, some.CONVS)
    module = base.module(edit.sites[0])
    x, y = at(base, edit.sites[0], [edit])
    weight = module.weight + ops.weight_delta([edit], module)
    assert torch.allclose(y, F.conv2d(x, weight, module.bias, module.stride, module.padding), atol=1e-4)


@pytest.mark.parametrize("reads", ["x", "y"])
@pytest.mark.parametrize(
    ("params", "phi"),
    [
        ({}, lambda h: h),
        ({"phi": "none"}, lambda h: h),
        ({"phi": "relu"}, torch.relu),
        ({"phi": "gelu"}, F.gelu),
        ({"phi": "topk", "k": 2}, lambda h: torch.where(h >= h.topk(2).values[..., -1:], h.relu(), 0)),
        ({"phi": "topk", "k": 99}, torch.relu),
    ],
)
def test_adapters(sd1: Base, params: dict, phi: object, reads: str) -> None:
    edit = some.adapter(sd1, reads=reads, **params)
    t, module = edit.tensors, sd1.module(edit.sites[0])
    x, y = at(sd1, edit.sites[0], [edit])
    plain = module(x)
    inner = ((x if reads == "x" else plain) - t["center"]) @ t["down"].T + t["bias"]
    assert torch.allclose(y, plain + phi(inner) @ t["up"].T, atol=1e-4)


def test_learned_rows_stand_behind_the_text(base: Base) -> None:
    """Keys and values of a cross-attention: those of the text, then the projected rows."""
    edit = some.tokens(base, n=3)
    for letter in "kv":
        site = f"{base.sites(CROSS)[0]}.to_{letter}"
        _, plain = at(base, site, [])
        _, longer = at(base, site, [edit])
        assert torch.allclose(longer[:, :-3], plain, atol=1e-6)
        rows = edit.tensors[f"prompt_{letter}"] @ base.module(site).weight.T
        assert torch.allclose(longer[:, -3:], rows.expand(2, -1, -1), atol=1e-5)


def test_rows_may_be_the_same_for_keys_and_values(base: Base) -> None:
    """Once in the file, and what is drawn is what two copies of them draw."""
    twice = some.tokens(base, n=3)
    twice = replace(twice, tensors={slot: twice.tensors["prompt_k"] for slot in ("prompt_k", "prompt_v")})
    once = replace(twice, tensors={"prompt": twice.tensors["prompt_k"]})
    assert some.eps(base, PROMPTS, [once]).equal(some.eps(base, PROMPTS, [twice]))
    assert not some.eps(base, PROMPTS, [once]).equal(some.eps(base, PROMPTS))


def test_rows_in_key_and_value_space_are_written_as_they_are(base: Base) -> None:
    edit = some.key_values(base)
    for letter in "kv":
        _, longer = at(base, f"{edit.sites[0]}.to_{letter}", [edit])
        assert longer[:, -2:].equal(edit.tensors[f"tokens_{letter}"].expand(2, -1, -1))


def test_strength_of_rows_is_how_often_they_stand_there(base: Base) -> None:
    """exp(logit + log s) = s exp(logit): strength 2 is the same rows twice over, 1/2 once of two."""
    once = some.tokens(base)
    twice = replace(once, tensors={slot: torch.cat([t, t]) for slot, t in once.tensors.items()})
    assert some.far(some.eps(base, PROMPTS, [replace(once, scale=2.0)]), some.eps(base, PROMPTS, [twice])) < 1e-5
    assert some.far(some.eps(base, PROMPTS, [replace(twice, scale=0.5)]), some.eps(base, PROMPTS, [once])) < 1e-5


def test_strength_runs_from_absent_to_whole(base: Base) -> None:
    """Monotone, continuous at 0 and at 1."""
    plain, edit = some.eps(base, PROMPTS), some.tokens(base)
    drawn = [some.eps(base, PROMPTS, [replace(edit, scale=s)]) for s in (1e-6, 0.3, 0.6, 1.0 - 1e-6, 1.0)]
    away = [some.far(one, plain) for one in drawn]
    assert away[0] < 1e-4 < away[1] < away[2] < away[4]
    assert some.far(drawn[3], drawn[4]) < 1e-5


WRONG = {
    "a row too wide": ("tokens", CROSS, {"prompt_k": (2, 7), "prompt_v": (2, 7)}),
    "a row of both too wide": ("tokens", CROSS, {"prompt": (2, 7)}),
    "rows for one half too few": ("tokens", CROSS, {"prompt": (2, 32), "without": (1, 32)}),
    "more keys than values": ("tokens", CROSS, {"prompt_k": (2, 32), "prompt_v": (1, 32)}),
    "a row without width": ("tokens", CROSS, {"prompt": ()}),
    "rows at a layer": ("tokens", CROSS_K, {"prompt_k": (2, 32), "prompt_v": (2, 32)}),
    "a weight at an attention": ("weight", CROSS, {"delta": (32, 32)}),
    "a pair of other widths": ("weight", CROSS_K, {"into": (7, 1), "down": (1, 7)}),
    "a mask over other features": ("weight", CROSS_K, {"keep": (7,)}),
    "bits of another width": ("weight", CROSS_K, {"bits": (16, 5)}),
    "a delta transposed": ("weight", CROSS_K, {"delta": (32, 16)}),
    "a flat convolution": ("weight", some.CONVS, {"up": (16, 1), "down": (1, 16)}),
    "a shift of a convolution": ("weight", some.CONVS, {"into": (16, 1), "down": (1, 16)}),
    "an adapter too wide for a convolution": ("adapter", some.CONVS, {"up": (16, 1), "down": (1, 9)}),
    "an adapter of two ranks": ("adapter", some.FEED, {"up": (16, 2), "down": (1, 64)}),
    "an adapter at a list": ("adapter", "unet.down_blocks", {"up": (16, 1), "down": (1, 16)}),
    "an adapter too narrow for a block": ("adapter", some.BLOCK, {"up": (16, 1), "down": (1, 15)}),
    "the weight of a norm": ("weight", "unet.conv_norm_out", {"delta": (32,)}),
    "an adapter too wide for a norm": ("adapter", "unet.*.norm1", {"up": (99, 1), "down": (1, 99)}),
    "no such module": ("weight", "unet.nowhere", {"delta": (1, 1)}),
    "outside the UNet": ("weight", "vae.decoder.conv_in", {"delta": (1, 1)}),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_does_not_fit_is_refused_before_it_runs(sd1: Base, case: str) -> None:
    op, pattern, shapes = WRONG[case]
    sites = sd1.sites(pattern)[:1] or (pattern,)
    tensors = {slot: torch.zeros(shape) for slot, shape in shapes.items()}
    hooks = some.hooks(sd1)
    with pytest.raises(MismatchError) as caught:
        some.eps(sd1, PROMPTS, [some.shared(sd1), Edit(op, sites, tensors)])
    assert caught.value.exit_code == 4 and sites[0] in str(caught.value)
    assert some.hooks(sd1) == hooks


def test_a_file_whose_rows_have_no_width_is_read_for_the_line_that_refuses_it(sd1: Base) -> None:
    """How many rows all files together add is asked before anything is held against the base."""
    edit = Edit("tokens", sd1.sites(CROSS)[:1], {"prompt": torch.zeros(())})
    (loaded,) = admission.load_all([Erasure(header(), (edit,))])
    with pytest.raises(MismatchError, match="needs prompt of shape"):
        some.eps(sd1, PROMPTS, loaded.erasure.edits)


def test_a_whole_pattern_of_sites_shares_one_pair(base: Base) -> None:
    """One `into down` at all keys and values is one change of the text they read."""
    edit = some.shared(base)
    text = base.encode(PROMPTS).states
    moved = text + text @ edit.tensors["down"].T @ edit.tensors["into"].T
    cond = replace(base.encode(PROMPTS), states=moved)
    with torch.no_grad():
        wanted = base.eps(base.noise([0, 1]), some.TIME, cond)
    assert set(edit.sites) == set(base.sites(CROSS_KV))
    assert some.far(some.eps(base, PROMPTS, [edit]), wanted) < 1e-5
