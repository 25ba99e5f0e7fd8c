"""Gates that look at the picture: when they open, for whom, for how long; and rows in the text's place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import edits as some
import pytest
import torch
from samples import header
from torch import Tensor

import conceptzap
from conceptzap import format
from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Erasure, Gate
from conceptzap.errors import ConceptZapError, MismatchError, RefusedError, SilentEditError
from conceptzap.runtime import gates, guides, sight
from conceptzap.runtime.attach import Attachment, attached, new_run
from conceptzap.trust import canary

PROMPTS = (some.ASKED[0], some.OTHER[1])
# open at 900, shut at 400 and below
EARLY = {"levels": (-1.0, -1.0, 1.0), "times": (0.0, 400.0, 900.0)}


@pytest.fixture
def early(sd1: Base) -> Iterator[Attachment]:
    """Rows behind a gate that opens early on, whatever is drawn."""
    attachment = Attachment(sd1.unet, [some.tokens(sd1, gates=[some.always(sd1, **EARLY)])])
    yield attachment
    attachment.remove()


@torch.no_grad()
def call(base: Base, t: int, rows: int = 1) -> Tensor:
    return base.eps(base.noise(range(rows)), t, base.encode(list(PROMPTS[:rows])))


@torch.no_grad()
def open_at(base: Base, t: int, rows: int = 1) -> int:
    hook = next(h for h in base.unet._forward_pre_hooks.values()).__self__
    before = hook.ledger.receipt.opened.sum()
    call(base, t, rows)
    return hook.ledger.receipt.opened.sum() - before


def test_a_call_that_opens_it_is_made_under_its_edits(base: Base) -> None:
    gated = some.tokens(base, gates=[some.always(base)])
    assert some.eps(base, PROMPTS, [gated]).equal(some.eps(base, PROMPTS, [replace(gated, gates=())]))


def test_its_self_test_counts_the_call_that_was_made_anew(sd1: Base) -> None:
    """What stands in front of the module that is looked at changed nothing in the first one."""
    gated = some.tokens(sd1, gates=[some.always(sd1)])
    (found,) = canary.make(sd1, [gated], PROMPTS[0]).values()
    (plain,) = canary.make(sd1, [replace(gated, gates=())], PROMPTS[0]).values()
    assert found["change"].keys() == plain["change"].keys() and min(found["change"].values()) > 0


def test_shut_it_leaves_every_bit(base: Base) -> None:
    gated = some.tokens(base, gates=[some.always(base, (-1.0,))])
    assert some.eps(base, PROMPTS, [gated]).equal(some.eps(base, PROMPTS))


def test_it_tells_rows_apart(base: Base) -> None:
    gated = some.tokens(base, gates=[some.sight(base)])
    with attached(base.unet, [gated]) as receipt, torch.no_grad():
        found = base.eps(base.noise([0, 1]), some.TIME, base.encode(list(PROMPTS)))
    assert receipt.tallies[0].opened == {0: 1} and receipt.tallies[0].shut == 1
    assert some.far(found[1], some.eps(base, PROMPTS)[1]) < 1e-5
    assert some.far(found[0], some.eps(base, PROMPTS, [replace(gated, gates=())])[0]) < 1e-5


def test_once_open_it_stays_open_until_the_run_ends(sd1: Base, early: Attachment) -> None:
    said = [open_at(sd1, t) for t in (300, 900, 500, 500, 100, 300, 200)]
    assert said == [False, True, True, True, True, False, False]


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_another_number_of_rows_does_not_forget(sd1: Base, early: Attachment, first: int, then: int) -> None:
    calls = (900, first), (200, then), (300, first), (200, then)  # from 300 on other pictures
    assert [open_at(sd1, *one) for one in calls] == [first, then, 0, 0]


def test_a_new_run_can_be_announced(sd1: Base, early: Attachment) -> None:
    assert open_at(sd1, 900)
    new_run(sd1.unet)
    assert not open_at(sd1, 300)


def test_threads_have_runs_of_their_own(sd1: Base, early: Attachment) -> None:
    assert open_at(sd1, 900)
    said: list[bool] = []
    other = Thread(target=lambda: said.append(open_at(sd1, 300)))
    other.start()
    other.join()
    assert said == [False] and open_at(sd1, 300)


def test_a_thread_that_is_refused_takes_nothing_from_the_one_that_draws(sd1: Base) -> None:
    """The call that is made anew once the gate has opened still has its own arguments."""
    gated, said = some.tokens(sd1, gates=[some.always(sd1)]), []

    def intrude(*_: object) -> None:
        other = Thread(target=refused)
        other.start()
        other.join()

    def refused() -> None:
        with pytest.raises(RefusedError, match="two threads"):
            call(sd1, 300)
        said.append("refused")

    hook = sd1.unet.mid_block.register_forward_hook(intrude)
    try:
        found = some.eps(sd1, PROMPTS, [gated])
    finally:
        hook.remove()
    assert said and found.equal(some.eps(sd1, PROMPTS, [replace(gated, gates=())]))


def test_it_does_not_look_below_its_lowest_time(sd1: Base) -> None:
    gate = some.always(sd1)
    late = replace(gate, params=gate.params | {"low": some.TIME + 1})
    edit = some.tokens(sd1, gates=[late])
    assert some.eps(sd1, PROMPTS, [edit]).equal(some.eps(sd1, PROMPTS))


def test_rows_of_equal_latents_are_one_picture(sd1: Base) -> None:
    """The halves of a classifier-free batch: what is seen in one opens both."""
    gated = some.tokens(sd1, gates=[some.sight(sd1)])
    with attached(sd1.unet, [gated]) as receipt, torch.no_grad():
        sd1.eps(sd1.noise([1, 0, 1, 0]), some.TIME, sd1.encode(["", "", some.OTHER[1], some.ASKED[0]]))
    assert sorted(receipt.tallies[0].opened) == [1, 3]


def test_a_pipeline_draws_each_picture_as_a_run(sd1: Base) -> None:
    """What was open when a run was left is shut for one that begins late (image to image)."""
    pipe = sd1.pipeline()
    pipe.set_progress_bar_config(disable=True)
    erasure = some.erasure(sd1, [some.tokens(sd1, gates=[some.always(sd1, **EARLY)])])
    with conceptzap.apply(pipe, erasure) as handle:
        assert open_at(sd1, 900) and open_at(sd1, 300)
        pipe("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent")  # at t = 1
        assert handle.receipt.tallies[0].open == 2 and handle.receipt.calls == 3


def test_residuals_that_the_unet_takes_from_their_list_are_there_again(sd1: Base) -> None:
    """Those of a T2I-Adapter."""
    learned = some.tokens(sd1)
    found = []
    for edit in (learned, replace(learned, gates=(some.always(sd1),))):
        residuals = [torch.full((1, 1, 1, 1), 0.5) for _ in sd1.unet.down_blocks]
        with torch.no_grad(), attached(sd1.unet, [edit]):
            found.append(
                sd1.unet(
                    sd1.noise([0]), some.TIME, sd1.encode(PROMPTS[:1]).states,
                    down_intrablock_additional_residuals=residuals,
                ).sample
            )  # fmt: skip
    assert found[0].equal(found[1]) and not found[0].equal(some.eps(sd1, PROMPTS[:1], [learned]))


def test_a_module_that_is_not_run_is_found(sd1: Base) -> None:
    middle = sd1.unet.mid_block
    edit = some.tokens(sd1, gates=[some.always(sd1)])
    with pytest.raises(SilentEditError, match="mid_block"), attached(sd1.unet, [edit]):
        middle._forward_pre_hooks.clear()
        middle._forward_hooks.clear()
        call(sd1, some.TIME)
    assert not middle._forward_hooks


def test_margins_are_seen_and_have_gradients(sd1: Base) -> None:
    """For whoever attacks it: how far it is from shutting, also while the text is free."""
    states = sd1.encode(PROMPTS[:1]).states.requires_grad_()
    edit = some.tokens(sd1, gates=[some.sight(sd1)])
    with attached(sd1.unet, [edit]), gates.straight_through(), sight.margins_seen() as found:
        noise = sd1.eps(sd1.noise([0]), some.TIME, Cond(states))
    (margin,) = found
    assert margin.shape == (1, 1) and margin.item() > 0
    for value in (margin.sum(), noise.sum()):
        (slope,) = torch.autograd.grad(value, states, retain_graph=True)
        assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize(
    ("times", "query", "offset"),
    [
        ((500.0, 100.0), (2, 4), (2,)), ((100.0, 500.0), (1, 4), (2,)), ((100.0,), (1, 4), (2,)),
        ((100.0,), (1, 2, 4), (1,)), ((100.0,), (1, 2, 4), (1, 3)), ((100.0,), (1, 0, 4), (1, 0)),
        ((100.0,), (4,), ()), ((), (0, 4), (0,)),
    ],
)  # fmt: skip
def test_a_probe_of_the_wrong_shape_is_refused(
    sd1: Base, times: tuple[float, ...], query: tuple[int, ...], offset: tuple[int, ...]
) -> None:
    gate = some.probe(torch.zeros(query), torch.zeros(offset), times)
    with pytest.raises(MismatchError, match="rising times"):
        Attachment(sd1.unet, [some.tokens(sd1, gates=[gate])])


def test_queries_of_whole_numbers_have_scales(sd1: Base, tmp_path: Path) -> None:
    """They read as what they are multiplied to, in a file, too; without a scale each they are refused."""
    query, scale = torch.tensor([[[127, -3], [0, 64]]]).to(torch.int8), torch.tensor([[0.25, 0.5]])
    offset, seen, times = torch.zeros(1, 2), some.randn(3, 2, seed=1), torch.full((3,), 5.0)
    exact = some.probe(query * scale[..., None], offset)
    whole = replace(exact, tensors=exact.tensors | {"query": query, "scale": scale})
    assert sight.scores(whole, seen, times).equal(sight.scores(exact, seen, times))
    for name, gate in (("a", whole), ("b", exact)):
        format.save(Erasure(header(), (some.tokens(sd1, gates=[gate]),)), tmp_path / name)
        assert format.load(tmp_path / name).edits[0].gates == (gate,)
    for tensors in (exact.tensors | {"query": query}, exact.tensors | {"scale": scale}):
        with pytest.raises(ConceptZapError, match="query is of"):
            edit = some.tokens(sd1, gates=[replace(exact, tensors=tensors)])
            format.save(Erasure(header(), (edit,)), tmp_path / "c")
    odd = replace(whole, tensors=whole.tensors | {"scale": scale[:, :1]})
    with pytest.raises(MismatchError, match="rising times"):
        Attachment(sd1.unet, [some.tokens(sd1, gates=[odd])])


@pytest.mark.parametrize("knots", [(500.0, 100.0), (100.0,), (100.0, 300.0, 500.0)])
def test_queries_have_a_rising_knot_each(sd1: Base, knots: tuple[float, ...]) -> None:
    gate = some.probe(torch.zeros(2, 4), torch.zeros(2), (100.0, 500.0))
    gate = Gate("sight", gate.params, gate.tensors | {"knots": torch.tensor(knots)})
    with pytest.raises(MismatchError, match="rising times"):
        Attachment(sd1.unet, [some.tokens(sd1, gates=[gate])])


def test_queries_are_linear_between_their_knots_and_offsets_between_their_times() -> None:
    query, offset = some.randn(2, 4, seed=1), some.randn(3, seed=2)  # [knots, channels], [times]
    seen, times = some.randn(4, 4, seed=3), torch.tensor([200.0, 300.0, 700.0, 999.0])
    gate = some.probe(query, offset, (100.0, 500.0, 900.0))
    gate = Gate("sight", gate.params, gate.tensors | {"knots": torch.tensor([300.0, 900.0])})
    q = torch.stack([query[0], query[0], (query[0] + 2 * query[1]) / 3, query[1]])
    far = torch.stack([(3 * offset[0] + offset[1]) / 4, (offset[0] + offset[1]) / 2, (offset[1] + offset[2]) / 2, offset[2]])
    assert torch.allclose(sight.scores(gate, seen, times), (q * seen).sum(-1) - far, atol=1e-6)


@torch.no_grad()
def test_it_may_look_at_several_modules_side_by_side(sd1: Base) -> None:
    """In the order of the gate, whatever the order they run in; what it reads is each one's unit mean."""
    paths, found = (some.MIDDLE, "unet.down_blocks.0"), {}
    watch = [
        sd1.module(path).register_forward_hook(lambda *given, path=path: found.update({path: given[-1]}))
        for path in paths
    ]
    some.eps(sd1, PROMPTS)
    for one in watch:
        one.remove()
    seen = torch.cat([sight.pooled(found[path]) for path in paths], -1)  # [rows, channels of both]
    query = some.randn(1, seen.shape[-1], seed=3)
    one = some.probe(query, torch.tensor([0.25]))
    gate = Gate("sight", one.params | {"beside": list(paths[1:])}, one.tensors)
    assert gate.modules == paths and some.tokens(sd1, gates=[gate]).modules[-2:] == paths
    with sight.margins_seen() as margins:
        some.eps(sd1, PROMPTS, [some.tokens(sd1, gates=[gate])])
    assert torch.allclose(margins[0][0], (seen @ query[0]) - 0.25, atol=1e-5)


def test_of_several_probes_the_highest_counts() -> None:
    """Each with an offset of its own, linear between the times as one probe is."""
    query, offset = some.randn(2, 3, 4, seed=1), some.randn(2, 3, seed=2)  # [times, probes, channels]
    seen, times = some.randn(5, 4, seed=3), torch.tensor([100.0, 300.0, 500.0, 50.0, 900.0])
    together = sight.scores(some.probe(query, offset, (100.0, 500.0)), seen, times)
    apart = [sight.scores(some.probe(query[:, i], offset[:, i], (100.0, 500.0)), seen, times) for i in range(3)]
    assert torch.allclose(together, torch.stack(apart).amax(0), atol=1e-6)
    assert len({int(one) for one in torch.stack(apart).argmax(0)}) > 1


def closer(base: Base) -> Gate:
    """Shut for whatever is drawn, and open where the text opens `some.gate`."""
    shut = some.always(base, (-1.0,))
    eased = shut.tensors["offset"] - 2
    return Gate("sight", shut.params | {"told": [some.gate(base).name]}, shut.tensors | {"eased": eased})


def test_where_the_text_names_the_concept_it_looks_closer(base: Base) -> None:
    """At the rows whose text opens the gate that it is told by, and at no others."""
    looks, named = some.tokens(base, gates=[closer(base)]), some.shared(base, gates=[some.gate(base)])
    found = some.eps(base, PROMPTS, [looks, named])
    assert found.equal(some.eps(base, PROMPTS, [replace(looks, gates=(some.gate(base),)), named]))
    assert not torch.allclose(found[0], some.eps(base, PROMPTS, [named])[0], atol=1e-3)
    assert torch.allclose(found[1], some.eps(base, PROMPTS)[1], atol=1e-5)
    assert some.eps(base, PROMPTS, [looks]).equal(some.eps(base, PROMPTS))  # no such gate: nobody told it


def test_what_it_is_told_by_is_a_gate_of_its_file(sd1: Base, tmp_path: Path) -> None:
    looks, named = some.tokens(sd1, gates=[closer(sd1)]), some.shared(sd1, gates=[some.gate(sd1)])
    format.save(Erasure(header(), some.sort_edits((looks, named))), tmp_path / "told")
    gate = next(gate for edit in format.load(tmp_path / "told").edits for gate in edit.gates if gate.kind == "sight")
    assert gate == closer(sd1)
    with pytest.raises(ConceptZapError, match="told"):
        format.save(Erasure(header(), (looks,)), tmp_path / "untold")
    for wrong in ([3], "x"):
        gate = replace(closer(sd1), params=closer(sd1).params | {"told": wrong})
        with pytest.raises(ConceptZapError, match="told"):
            format.save(Erasure(header(), (replace(looks, gates=(gate,)), named)), tmp_path / "untold")


def test_what_it_looks_at_is_kept_in_the_file_and_held_to_be_paths(sd1: Base, tmp_path: Path) -> None:
    def saved(beside: object) -> Path:
        one = some.always(sd1)
        gate = Gate("sight", one.params | {"beside": beside}, one.tensors)
        format.save(Erasure(header(), (some.tokens(sd1, gates=[gate]),)), tmp_path / "looks", True)
        return tmp_path / "looks"

    (edit,) = format.load(saved(["unet.down_blocks.0"])).edits
    assert edit.gates[0].modules == (some.MIDDLE, "unet.down_blocks.0")
    for wrong in (["../x"], [3], "unet.down_blocks.0"):
        with pytest.raises(ConceptZapError, match="beside|module path"):
            saved(wrong)


def test_another_width_and_another_site_are_refused(sd1: Base) -> None:
    narrow = some.probe(torch.zeros(1, 3), torch.zeros(1))
    with pytest.raises(MismatchError, match="reads 3 channels"):
        some.eps(sd1, PROMPTS, [some.tokens(sd1, gates=[narrow])])
    gate = some.always(sd1)
    for where in ({"site": "unet.nothing"}, {"beside": ["unet.nothing"]}):
        gone = Gate("sight", gate.params | where, gate.tensors)
        with pytest.raises(MismatchError, match="no module"):
            Attachment(sd1.unet, [some.tokens(sd1, gates=[gone])])
    assert "unet" in sd1.fingerprint(Edit("tokens", (), {}, gates=(gate,)).modules)


def test_rows_alone_stand_in_place_of_the_text(base: Base) -> None:
    """All states of another prompt as learned rows: what is drawn is that prompt's, whatever was asked."""
    other = base.encode([some.OTHER[2]])
    rows = {f"prompt_{x}": other.states[0] for x in "kv"}
    edit = replace(some.tokens(base), tensors=rows, params={"alone": True})
    noise, asked = base.noise([0]), base.encode(PROMPTS[:1])
    wanted = replace(asked, states=other.states)  # pooled text is none of the cross-attention's
    with torch.no_grad():
        plain = base.eps(noise, some.TIME, wanted)
        with attached(base.unet, [edit]):
            found = base.eps(noise, some.TIME, asked)
        with attached(base.unet, [replace(edit, scale=0.5)]):
            half = base.eps(noise, some.TIME, asked)
    assert some.far(found, plain) < 2e-5
    assert some.far(half, plain) > 1e-4


@torch.no_grad()
def test_rows_alone_keep_the_halves_of_guidance_apart(base: Base) -> None:
    """Those without a prompt get rows of their own, in whatever batch, where somebody says which they are."""
    given, without = base.encode([some.OTHER[2]]), base.encode(["cat"])
    rows = {"prompt": given.states[0], "without": without.states[0]}
    gated = replace(some.tokens(base, gates=[some.always(base)]), tensors=rows, params={"alone": True})
    asked, noise = base.encode(["", "", *PROMPTS]), base.noise([0, 1, 0, 1])

    halves, whole = [without.states] * 2 + [given.states] * 2, [given.states] * 4
    wanted = {
        below: base.eps(noise, some.TIME, replace(asked, states=torch.cat(states)))
        for below, states in ((2, halves), (0, whole), (None, whole))
    }
    with attached(base.unet, [gated]):
        for below in (2, 0, 2, None, 2):  # of the very same text
            with guides.Guidance(lambda _, below=below: below).told():
                found = base.eps(noise, some.TIME, asked)
            assert some.far(found, wanted[below]) < 2e-5, below


@torch.no_grad()
def test_rows_for_halves_are_open_in_both_rows_of_a_picture(base: Base) -> None:
    """What a prompt opens is open in the row without one, too, and nothing that row says itself."""
    edit = some.halved(base, gates=[some.gate(base)])
    asked, noise = base.encode([*PROMPTS[::-1], *PROMPTS]), base.noise([0, 1, 0, 1])
    assert [*gates.factor(edit, gates.Signal(asked.states, torch.zeros(4)))] == [0, 1, 1, 0]
    plain = base.eps(noise, some.TIME, asked)
    for below, moved in ((2, [0, 2]), (1, [1, 2]), (0, [1, 2]), (None, [1, 2])):  # of which halves nobody knows
        with attached(base, [edit]) as receipt, guides.Guidance(lambda _, below=below: below).told():
            found = base.eps(noise, some.TIME, asked)
        assert [row for row in range(4) if some.far(found[row], plain[row]) > 1e-4] == moved, below
        assert sorted(receipt.tallies[0].opened) == moved


def test_rows_for_halves_are_not_guessed_of_a_part(sd1: Base) -> None:
    """Where a cross-attention is run row by row nobody knows which half it is in."""
    edit = replace(some.tokens(sd1), tensors={slot: some.randn(2, some.width(sd1)) for slot in ("prompt", "without")})
    attention = sd1.module(edit.sites[0])

    def in_parts(hidden: Tensor, encoder_hidden_states: Tensor, **more: object) -> Tensor:
        parts = zip(hidden.split(1), encoder_hidden_states.split(1), strict=True)
        return torch.cat([attention(*part, **more) for part in parts])

    block = next(m for m in sd1.unet.modules() if getattr(m, "attn2", None) is attention)
    with pytest.raises(SilentEditError, match="some of a call's rows"), attached(sd1.unet, [edit]):
        del block.attn2
        block.attn2 = in_parts
        try:
            with guides.Guidance(lambda _: 1).told():
                call(sd1, some.TIME, rows=2)
        finally:
            del block.attn2
            block.attn2 = attention
