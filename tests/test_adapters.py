"""Adapters at any module of the UNet: what they add, what they read, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch
import torch.nn.functional as F

from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Gate
from conceptzap.errors import FormatError, MismatchError, RefusedError
from conceptzap.runtime import adapters, gates
from conceptzap.runtime.attach import attached
from conceptzap.trust import canary

PROMPTS = (some.ASKED[0], some.OTHER[1])
# how a module takes and gives pictures and rows: tuples, channels first, sizes that change, no weight
PLACES = {
    "transformer": "unet.*.attentions.0",
    "block of it": "unet.*.transformer_blocks.0",
    "attention": "unet.*.attn2",
    "self-attention": "unet.*.attn1",
    "residual block": "unet.*.resnets.0",
    "convolution": "unet.*.resnets.0.conv1",
    "norm": "unet.*.resnets.0.norm1",
    "smaller": "unet.*.downsamplers.0",
    "larger": "unet.*.upsamplers.0",
    "dropout": "unet.*.attn2.to_out.1",
    "time": "unet.time_embedding.linear_2",
}


def seen(base: Base, site: str, edits: list[Edit]) -> tuple[torch.Tensor, torch.Tensor]:
    """First input and first output of a module under the edits, the input before any edit."""
    found: list[torch.Tensor] = []
    with attached(base.unet, edits), torch.no_grad():
        module = base.module(site)
        handles = [
            module.register_forward_pre_hook(
                lambda m, a, k: found.append(adapters.given(site, a, k)), prepend=True, with_kwargs=True
            ),
            module.register_forward_hook(lambda m, a, output: found.append(adapters.made(site, output))),
        ]
        base.eps(base.noise([0, 1]), some.TIME, base.encode(PROMPTS))
        for handle in handles:
            handle.remove()
    return found[0], found[1]


def by_hand(edit: Edit, x: torch.Tensor) -> torch.Tensor:
    """up gelu(down x) over the features of x: of pictures, as two 1 x 1 convolutions."""
    up, down = edit.tensors["up"], edit.tensors["down"]
    if x.ndim == 4:
        return F.conv2d(F.gelu(F.conv2d(x, down[..., None, None])), up[..., None, None])
    return F.gelu(x @ down.T) @ up.T


def at(base: Base, place: str, **params: object) -> Edit:
    pattern = PLACES[place]
    if adapters.widths(base.module(base.sites(pattern)[-1])).out is None:  # a dropout does not say
        width = len(base.module(base.sites("unet.*.attn2.to_out.0")[-1]).weight)
        tensors = {"up": some.randn(width, 4) / 4, "down": some.randn(4, width, seed=1) / 4}
        return Edit("adapter", base.sites(pattern)[-1:], tensors, {"phi": "gelu", **params})
    return some.beside(base, pattern, **params)


@pytest.mark.parametrize("place", sorted(PLACES))
def test_it_adds_to_the_output_of_any_module(base: Base, place: str) -> None:
    edit = at(base, place, reads="y")
    (site,) = edit.sites
    _, plain = seen(base, site, [])
    _, edited = seen(base, site, [edit])
    assert torch.allclose(edited, plain + by_hand(edit, plain), atol=1e-5)
    canary.check(base, some.erasure(base, [edit]))


@pytest.mark.parametrize("place", ["transformer", "residual block", "convolution", "norm", "time", "attention"])
def test_it_reads_the_input_and_writes_the_output(base: Base, place: str) -> None:
    edit = at(base, place, reads="x")
    x, plain = seen(base, edit.sites[0], [])
    _, edited = seen(base, edit.sites[0], [edit])
    assert torch.allclose(edited, plain + by_hand(edit, x), atol=1e-5)


def test_a_skip_connection_is_edited_where_it_is_read(base: Base) -> None:
    """Only the channels of the skip move, and the decoder's layer reads them moved."""
    edit = some.skip(base)
    module, (site,) = base.module(edit.sites[0]), edit.sites
    up = edit.tensors["up"].clone()
    up[: up.shape[0] // 2] = 0
    edit = replace(edit, tensors={**edit.tensors, "up": up})
    x, plain = seen(base, site, [])
    _, edited = seen(base, site, [edit])
    moved = x + by_hand(edit, x)
    assert moved[:, : up.shape[0] // 2].equal(x[:, : up.shape[0] // 2])
    times: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: times.append(args[1]))
    some.eps(base, PROMPTS)
    handle.remove()
    with torch.no_grad():
        assert torch.allclose(edited, module(moved, times[0]), atol=1e-5)
    assert not torch.allclose(edited, plain, atol=1e-3)


def test_beside_learned_tokens_at_the_same_attention(base: Base) -> None:
    """Two hooks count the rows of one module, each for itself, and neither disturbs the other."""
    pair = [at(base, "attention", reads="y"), some.tokens(base)]
    drawn = [some.eps(base, PROMPTS, order) for order in (pair, pair[::-1])]
    assert drawn[0].equal(drawn[1])
    for edit in pair:
        assert some.far(some.eps(base, PROMPTS, [edit]), drawn[0]) > 1e-4
    (site,) = pair[0].sites
    _, alone = seen(base, site, pair[1:])
    _, both = seen(base, site, pair)
    assert torch.allclose(both, alone + by_hand(pair[0], alone), atol=1e-5)


def test_rows_of_a_mixed_call_are_accounted_for(base: Base) -> None:
    edits = [some.beside(base, gates=[some.gate(base)]), some.skip(base)]
    with attached(base.unet, edits) as receipt, torch.no_grad():
        base.eps(base.noise([0, 1]), some.TIME, base.encode(PROMPTS))
    assert [(tally.open, tally.shut) for tally in receipt.tallies] == [(1, 1), (2, 0)]
    receipt.verify(1)


def test_where_a_picture_changes_its_size_it_must_read_what_it_writes(sd1: Base) -> None:
    for place in ("smaller", "larger"):
        with pytest.raises(MismatchError, match="changes the size"):
            some.eps(sd1, PROMPTS, [at(sd1, place, reads="x")])


def test_what_cannot_be_told_before_is_refused_when_it_runs(sd1: Base) -> None:
    narrow = replace(at(sd1, "dropout"), tensors={"up": torch.zeros(7, 1), "down": torch.zeros(1, 7)})
    hooks = some.hooks(sd1)
    with pytest.raises(MismatchError, match="the erasure reads 7"):
        some.eps(sd1, PROMPTS, [narrow])
    assert some.hooks(sd1) == hooks


@pytest.mark.parametrize("site", ["unet.down_blocks", "unet.up_blocks.0.resnets"])
def test_a_list_of_modules_never_runs(sd1: Base, site: str) -> None:
    edit = Edit("adapter", (site,), {"up": torch.zeros(16, 1), "down": torch.zeros(1, 16)})
    with pytest.raises(MismatchError, match="cannot take"):
        some.eps(sd1, PROMPTS, [edit])


def test_input_cannot_be_written_by_what_reads_the_output(sd1: Base) -> None:
    with pytest.raises(MismatchError, match="cannot write the input"):
        some.eps(sd1, PROMPTS, [at(sd1, "transformer", reads="y", writes="x")])


def test_a_module_that_gives_no_tensor_is_refused() -> None:
    with pytest.raises(RefusedError, match="no tensor that an edit could change"):
        adapters.made("unet.x", {"sample": torch.zeros(1)})
    with pytest.raises(RefusedError, match="no tensor that an edit could read"):
        adapters.given("unet.x", (), {"states": [1]})


@pytest.mark.parametrize("place", ["transformer", "residual block"])
def test_an_adapter_reads_the_own_output_of_a_layer_others_move(sd1: Base, place: str) -> None:
    """Of a layer the output is the base's own, whoever moves its input; order does not matter."""
    moves, reads = some.beside(sd1, PLACES[place], writes="x"), at(sd1, place, reads="y")
    one, two = (some.eps(sd1, PROMPTS, order) for order in ([moves, reads], [reads, moves]))
    assert one.equal(two)


def timed(base: Base, **more: torch.Tensor) -> Edit:
    """Features of their own gain and threshold at each of three timesteps."""
    edit = some.beside(base, reads="y", phi="none")
    tensors = {"times": torch.tensor([100.0, 500, 900]), "gain": some.randn(3, 4), "threshold": some.randn(3, 4) / 9}
    return replace(edit, tensors={**edit.tensors, **tensors, **more})


def amplified(edit: Edit, x: torch.Tensor, line: int) -> torch.Tensor:
    up, down, gain, threshold = (edit.tensors[slot] for slot in ("up", "down", "gain", "threshold"))
    h = x.movedim(1, -1) @ down.T
    h = torch.where(h > threshold[line], gain[line] * h, torch.zeros_like(h))
    return (h @ up.T).movedim(-1, 1)


def test_features_have_the_gain_and_threshold_of_the_nearest_timestep(base: Base) -> None:
    """Each row its own, in one call."""
    edit, asked, (site,) = timed(base), (90, 640), timed(base).sites
    cond, found = base.encode(PROMPTS), []
    for edits in ([], [edit]):
        with attached(base.unet, edits), torch.no_grad():
            handle = base.module(site).register_forward_hook(lambda m, a, output: found.append(output[0]))
            base.eps(base.noise([0, 1]), torch.tensor(asked), cond)
            handle.remove()
    plain, edited = found
    for row, line in enumerate((0, 1)):
        wanted = plain[[row]] + amplified(edit, plain[[row]], line)
        assert torch.allclose(edited[[row]], wanted, atol=1e-5)
    canary.check(base, some.erasure(base, [edit]))


def test_one_gain_and_threshold_hold_at_all_timesteps(sd1: Base) -> None:
    edit = timed(sd1)
    always = {slot: edit.tensors[slot][1] for slot in ("gain", "threshold")}
    fixed = replace(edit, tensors={**{s: edit.tensors[s] for s in ("up", "down")}, **always})
    assert some.eps(sd1, PROMPTS, [fixed]).equal(some.eps(sd1, PROMPTS, [edit]))
    assert not some.eps(sd1, PROMPTS, [fixed], 900).equal(some.eps(sd1, PROMPTS, [edit], 900))


@pytest.mark.parametrize("wrong", [{"gain": torch.ones(2, 4)}, {"threshold": torch.ones(3, 3)}, {"times": torch.ones(4)}])
def test_gains_are_for_every_feature_and_timestep(sd1: Base, wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(MismatchError, match="needs"):
        some.eps(sd1, PROMPTS, [timed(sd1, **wrong)])


def curved(edit: Edit, values: torch.Tensor) -> Edit:
    return replace(edit, gates=(Gate("curve", {}, {"times": torch.tensor([0.0, 1000.0]), "values": values}),))


@pytest.mark.parametrize("maker", [some.tokens, some.shared])
def test_a_curve_may_differ_from_site_to_site(sd1: Base, maker: Any) -> None:
    """As if there were an edit of its own at every site, in one row of the receipt."""
    whole = maker(sd1)
    sites = sorted(whole.sites)
    values = torch.linspace(0, 1, len(sites)).repeat(2, 1)
    edit = curved(whole, values)
    apart = [replace(whole, sites=(s,), scale=v.item()) for s, v in zip(sites, values[0], strict=True)]
    with attached(sd1.unet, [edit, some.skip(sd1)]) as receipt, torch.no_grad():
        drawn = sd1.eps(sd1.noise([0, 1]), some.TIME, sd1.encode(PROMPTS))
    assert some.far(drawn, some.eps(sd1, PROMPTS, [*apart, some.skip(sd1)])) < 1e-5
    assert [(tally.open, tally.shut) for tally in receipt.tallies] == [(2, 0), (2, 0)]
    assert receipt.edits[0].name == edit.name
    found = gates.factor(edit, gates.Signal(sd1.encode(PROMPTS).states, torch.tensor([500.0, 500])))
    assert found.tolist() == [1, 1]
    shuffled = replace(edit, sites=edit.sites[::-1])
    assert some.eps(sd1, PROMPTS, [shuffled]).equal(some.eps(sd1, PROMPTS, [edit]))
    shut = curved(whole, torch.zeros(2, len(sites)))
    assert some.eps(sd1, PROMPTS, [shut]).equal(some.eps(sd1, PROMPTS))


def test_a_curve_for_other_sites_is_refused(sd1: Base) -> None:
    with pytest.raises(MismatchError, match="is for 3 sites"):
        some.eps(sd1, PROMPTS, [curved(some.tokens(sd1), torch.ones(2, 3))])


def test_positions_attend_to_each_other(base: Base) -> None:
    """CPE's residual gate: K + up down (sigmoid(Z w) Z), Z = softmax(X Q (X Q)^T) X."""
    edit, t = some.attending(base), some.attending(base).tensors
    x, plain = seen(base, edit.sites[0], [])
    _, edited = seen(base, edit.sites[0], [edit])
    xq = x @ t["query"].T
    z = (xq @ xq.mT).softmax(-1) @ x
    wanted = plain + (torch.sigmoid(z @ t["gate"])[..., None] * z) @ t["down"].T @ t["up"].T
    assert torch.allclose(edited, wanted, atol=1e-5)
    canary.check(base, some.erasure(base, [edit]))


def projecting(base: Base, *names: str, **params: Any) -> Edit:
    """Weight 1 everywhere, unless it is asked for otherwise: the sigmoid is far on its right."""
    made = some.projecting(base)
    return replace(made, tensors={"prompt": base.encode(names).states.float()}, params={**made.params, **params})


def test_values_are_made_orthogonal_to_the_concepts(base: Base) -> None:
    """To all of them at once, position by position; the first position stays."""
    edit = projecting(base, "van gogh", "cat", "house")
    (site,) = edit.sites
    _, plain = seen(base, site, [])
    _, edited = seen(base, site, [edit])
    values = edit.tensors["prompt"] @ base.module(site).weight.T  # [3, length, out]
    assert torch.equal(edited[:, 0], plain[:, 0])
    inside = torch.einsum("rjo,kjo->rjk", edited, values)[:, 1:]
    assert inside.abs().max() < 1e-3 * (plain.norm(dim=-1).max() * values.norm(dim=-1).max())
    q, _ = torch.linalg.qr(values.movedim(0, -1))  # an orthonormal basis of the three at each position
    wanted = plain - torch.einsum("jok,jpk,rjp->rjo", q, q, plain)
    assert torch.allclose(edited[:, 1:], wanted[:, 1:], atol=1e-4)


def test_what_is_said_twice_is_taken_away_once(base: Base) -> None:
    """Two concepts are told apart only from where their texts differ: "a" is the same in both."""
    (site,) = projecting(base, "a cat").sites
    found = [seen(base, site, [projecting(base, *names)])[1] for names in (["a cat"], ["a cat"] * 2, ["a cat", "a dog"])]
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[0][:, 1], found[2][:, 1], atol=1e-5)


def test_a_projection_is_weighted_by_likeness(base: Base) -> None:
    """AdaVD's equation with its own numbers, written out for one concept."""
    edit = projecting(base, "van gogh", height=2.0, shift=0.93)
    (site,) = edit.sites
    _, v = seen(base, site, [])
    _, edited = seen(base, site, [edit])
    c = edit.tensors["prompt"][0] @ base.module(site).weight.T
    cos = F.cosine_similarity(v, c, dim=-1)
    w = 2 / (1 + torch.exp(-100 * (cos - 0.93)))
    wanted = v - (w * (v * c).sum(-1) / (c * c).sum(-1))[..., None] * c
    assert torch.allclose(edited[:, 1:], wanted[:, 1:], atol=1e-4)
    canary.check(base, some.erasure(base, [edit]))


def test_a_projection_beside_learned_tokens_and_in_longer_texts(sd1: Base) -> None:
    edit = projecting(sd1, "van gogh")
    pair = [edit, some.tokens(sd1)]
    assert some.far(some.eps(sd1, PROMPTS, pair), some.eps(sd1, PROMPTS, pair[::-1])) < 1e-5
    (site,) = edit.sites
    cond = sd1.encode(PROMPTS)
    twice = replace(cond, states=torch.cat([cond.states, cond.states], 1))
    found = []
    with attached(sd1.unet, [edit]), torch.no_grad():
        handle = sd1.module(site).register_forward_hook(lambda m, a, output: found.append(output))
        for one in (cond, twice):
            sd1.eps(sd1.noise([0, 1]), some.TIME, one)
        handle.remove()
    assert torch.allclose(found[1], torch.cat([found[0], found[0]], 1), atol=1e-5)


@pytest.mark.parametrize("maker", [some.attending, projecting])
def test_what_needs_positions_is_refused_elsewhere(sd1: Base, maker: Any) -> None:
    made = maker(sd1) if maker is some.attending else maker(sd1, "van gogh")
    with pytest.raises(MismatchError, match="no layer of text"):
        some.eps(sd1, PROMPTS, [replace(made, sites=sd1.sites(some.BLOCK)[:1])])


@pytest.mark.parametrize("maker", [timed, some.attending, projecting])
def test_a_file_gives_every_kind_back(sd1: Base, maker: Any, tmp_path: Path) -> None:
    made = maker(sd1, "van gogh") if maker is projecting else maker(sd1)
    format.save(some.erasure(sd1, [made]), tmp_path / "a.lprompt.safetensors")
    (back,) = format.load(tmp_path / "a.lprompt.safetensors").edits
    assert back.name == made.name
    assert some.eps(sd1, PROMPTS, [back]).equal(some.eps(sd1, PROMPTS, [made]))


@pytest.mark.parametrize(
    ("params", "without", "said"),
    [
        ({"phi": "project"}, "", "parameter 'height' is missing"),
        ({"phi": "attend"}, "gate", "wrong slots"),
        ({"phi": "relu"}, "", "wrong slots"),
        ({"phi": "topk"}, "", "parameter 'k' is missing"),
    ],
)
def test_tensors_and_parameters_go_with_their_phi(sd1: Base, params: dict, without: str, said: str) -> None:
    edit = some.attending(sd1)
    tensors = {slot: t for slot, t in edit.tensors.items() if slot != without}
    with pytest.raises(FormatError, match=said):
        format.dumps(replace(some.erasure(sd1, [some.shared(sd1)]), edits=(replace(edit, tensors=tensors, params=params),)))
