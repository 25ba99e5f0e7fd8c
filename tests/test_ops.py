"""What each op adds, against the formula written out."""

from __future__ import annotations

from dataclasses import replace

import edits as some
import pytest
import torch
import torch.nn.functional as F

from conceptzap.base import CROSS, CROSS_K, CROSS_KV, Base
from conceptzap.edit import Edit
from conceptzap.errors import MismatchError
from conceptzap.runtime import ops
from conceptzap.runtime.attach import attached

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


@pytest.mark.parametrize("maker", [some.low_rank, some.delta, some.mask])
def test_convolutions(base: Base, maker: object) -> None:
    edit = maker(base, some.CONVS)
    module = base.module(edit.sites[0])
    x, y = at(base, edit.sites[0], [edit])
    weight = module.weight + ops.weight_delta(edit, module)
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
    "rows at a layer": ("tokens", CROSS_K, {"prompt_k": (2, 32), "prompt_v": (2, 32)}),
    "a weight at an attention": ("weight", CROSS, {"delta": (32, 32)}),
    "a pair of other widths": ("weight", CROSS_K, {"into": (7, 1), "down": (1, 7)}),
    "a delta transposed": ("weight", CROSS_K, {"delta": (32, 16)}),
    "a flat convolution": ("weight", some.CONVS, {"up": (16, 1), "down": (1, 16)}),
    "a shift of a convolution": ("weight", some.CONVS, {"into": (16, 1), "down": (1, 16)}),
    "an adapter at a convolution": ("adapter", some.CONVS, {"up": (16, 1), "down": (1, 16)}),
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
