"""The laws of the algebra, on tiny bases of all families. (That nothing below the methods knows a
method's name is in `test_layers`.)"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import edits as some
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptzap import format
from conceptzap.base import CROSS, CROSS_KV, Base, find_module
from conceptzap.edit import Edit, sort_edits, stack
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime import guides
from conceptzap.runtime.attach import Attachment, attached, bake

PROMPTS = (some.ASKED[0], some.OTHER[1])
Maker = Callable[..., Edit]
WEIGHTS: dict[str, Maker] = {
    "shared": some.shared,
    "low rank": some.low_rank,
    "delta": some.delta,
    "mask": some.mask,
    "convolution": lambda base, **k: some.low_rank(base, some.CONVS, **k),
    "dense convolution": lambda base, **k: some.delta(base, some.CONVS, **k),
    "columns": some.columns,
    "packed": lambda base, **k: some.packed(base, some.CONVS, **k),
    "pruned keys": lambda base, **k: some.mask(base, CROSS_KV, **k),
}
OTHERS: dict[str, Maker] = {
    "rows": some.tokens,
    "rows alone": lambda base, **k: some.tokens(base, params={"alone": True}, **k),
    "rows for halves": some.halved,
    "key rows": some.key_values,
    "adapter": some.adapter,
    "gelu": lambda base, **k: some.adapter(base, phi="gelu", reads="y", **k),
    "topk": lambda base, **k: some.adapter(base, phi="topk", k=2, **k),
    "attend": some.attending,
    "project": some.projecting,
    "block": some.beside,
    "skip": some.skip,
    "swap": some.guide,
    "safe": lambda base, **k: some.guide(base, "safe", **k),
    "conditional": lambda base, **k: some.conditional(some.shared(base, **k)),
    "conditional rows": lambda base, **k: some.conditional(some.tokens(base, **k)),
}
MAKERS = WEIGHTS | OTHERS
TEXTS: dict[str, Maker] = {
    "text": some.in_text,
    "text pair": lambda base, **k: some.in_text(base, "text.1.*.0.*.q_proj", form="into", **k),
    "dense text": lambda base, **k: some.in_text(base, "text.*.0.*.out_proj", form="delta", **k),
    "text mask": lambda base, **k: some.in_text(base, "text.1.*.0.*.fc2", form="keep", **k),
    "words": lambda base, **k: some.in_text(base, some.TABLE, **k),
    "moved words": lambda base, **k: some.in_text(base, some.TABLE, form="into", **k),
    "dense words": lambda base, **k: some.in_text(base, "text.1.*token_embedding", form="delta", **k),
}
ALL = MAKERS | TEXTS
GUIDES = ("safe", "swap")
GATES = ("always", "window", "match", "sight")
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)


def made(base: Base, name: str, seed: int, gate: str = "always", scale: float = 1.0) -> Edit:
    gates = {
        "always": (), "window": (some.window(some.TIME, 900),),
        "match": (some.gate(base),), "sight": (some.sight(base),),
    }  # fmt: skip
    gated = {} if name in TEXTS else {"gates": gates[gate]}
    return replace(ALL[name](base, seed=seed, **gated), scale=scale)


@cache
def plain(base: Base, prompts: tuple[str, ...] = PROMPTS) -> torch.Tensor:
    """The base's own noise, seen once: nothing that was attached since may have left a trace."""
    return some.eps(base, prompts)


def stacks(names: dict[str, Maker], gates: tuple[str, ...] = GATES) -> st.SearchStrategy:
    """Arguments of `made` for two to five edits."""
    scales = st.sampled_from((0.5, 1.0, 1.5))
    one = st.tuples(st.sampled_from(sorted(names)), st.integers(0, 9), st.sampled_from(gates), scales)
    return st.lists(one, min_size=2, max_size=5, unique=True)


@pytest.mark.parametrize("edits", ["none", "strength 0"])
def test_identity(base: Base, edits: str) -> None:
    absent = [] if edits == "none" else [replace(maker(base), scale=0.0) for maker in ALL.values()]
    assert some.eps(base, PROMPTS, absent).equal(plain(base))


@few
@given(stacks(ALL))
def test_reversal(base: Base, drawn: list) -> None:
    weights = [value.clone() for value in _weights(base)]
    before, hooks = plain(base), some.hooks(base)
    during = some.eps(base, PROMPTS, [made(base, *one) for one in drawn])
    assert not during.equal(before)
    assert some.eps(base, PROMPTS).equal(before) and some.hooks(base) == hooks
    assert all(value.equal(kept) for value, kept in zip(_weights(base), weights, strict=True))


def _weights(base: Base) -> list[torch.Tensor]:
    return [value for part in (base.unet, *base.text_encoders) for value in part.state_dict().values()]


@few
@given(st.data())
def test_order_free(base: Base, data: st.DataObject) -> None:
    edits = [made(base, *one) for one in data.draw(stacks(ALL))]
    shuffled = data.draw(st.permutations(edits))
    assert some.far(some.eps(base, PROMPTS, shuffled), some.eps(base, PROMPTS, edits)) < 2e-5
    in_files = [[edit.name for edit in sort_edits(order)] for order in (edits, shuffled)]
    assert in_files[0] == in_files[1]  # the same edits in one order: the same bits


def test_base_relative_masks_and_changes(base: Base) -> None:
    """A mask and a change of one weight each start from the base's own."""
    pair = [some.mask(base), some.delta(base)]
    weight = base.module(pair[0].sites[0]).weight
    together = torch.where(pair[0].tensors["keep"], weight, 0) + pair[1].tensors["delta"]
    alone = Edit("weight", pair[0].sites, {"delta": together - weight})
    wanted = some.eps(base, PROMPTS, [alone])
    for order in (pair, pair[::-1]):
        assert some.far(some.eps(base, PROMPTS, order), wanted) < 2e-5


def test_base_relative_rows(base: Base) -> None:
    """Learned rows are projected by the base's own weights, whatever else changes these."""
    site = base.sites(CROSS)[0]
    prompt = replace(some.tokens(base), sites=(site,))
    projected = {
        f"tokens_{x}": prompt.tensors[f"prompt_{x}"] @ base.module(f"{site}.to_{x}").weight.T for x in "kv"
    }
    beside = [some.shared(base, seed=3), some.delta(base, CROSS_KV, seed=4)]
    changed = some.eps(base, PROMPTS, [prompt, *beside])
    assert some.far(some.eps(base, PROMPTS, [Edit("tokens", (site,), projected), *beside]), changed) < 2e-5
    assert some.far(some.eps(base, PROMPTS, beside), changed) > 1e-3


def test_base_relative_outputs(base: Base) -> None:
    """An adapter that reads an output reads the base's own, also where others shift the input."""
    site = base.sites("unet.*.attn2.to_v")[0]
    wide, narrow = base.module(site).weight.shape
    down, up = some.randn(3, wide, seed=5), some.randn(wide, 3, seed=6) / 4
    reader = Edit("adapter", (site,), {"down": down, "up": up}, {"phi": "relu", "reads": "y"})
    shift = Edit("weight", (site,), dict(some.shared(base, seed=3).tensors))
    delta = base.module(site).weight @ shift.tensors["into"] @ shift.tensors["down"]
    added = Edit("weight", (site,), {"delta": delta})
    wanted = some.eps(base, PROMPTS, [reader, added])
    for extra in ([], [some.tokens(base)]):
        both = [some.eps(base, PROMPTS, [reader, one, *extra]) for one in (added, shift)]
        assert some.far(both[0], both[1]) < 2e-5
    assert some.far(some.eps(base, PROMPTS, [shift]), wanted) > 1e-4
    assert narrow == shift.tensors["into"].shape[0]


@few
@given(stacks(WEIGHTS, ("always",)))
def test_bake_is_attach(base: Base, drawn: list) -> None:
    edits = [made(base, *one) for one in drawn]
    baked = replace(base, unet=copy.deepcopy(base.unet))
    weights = {name: value.to(base.dtype) for name, value in bake(base.unet, edits).items()}
    assert not baked.unet.load_state_dict(weights, strict=False).unexpected_keys
    attached_ = some.eps(base, PROMPTS, edits)
    assert some.far(some.eps(baked, PROMPTS), attached_) < 2e-5
    assert some.far(plain(base), attached_) > 1e-4


def test_what_only_hooks_can_do_is_not_baked(base: Base) -> None:
    gated = some.shared(base, gates=[some.gate(base)])
    conditional = some.conditional(some.shared(base))
    for edit in (some.tokens(base), some.adapter(base), gated, some.guide(base), conditional):
        with pytest.raises(RefusedError, match="cannot be baked"):
            bake(base.unet, [edit])


@few
@given(stacks(ALL))
def test_round_trip(base: Base, tmp_path_factory: pytest.TempPathFactory, drawn: list) -> None:
    edits = [made(base, *one) for one in drawn]
    path = tmp_path_factory.mktemp("trip") / f"one{format.SUFFIX}"
    saved = replace(some.erasure(base), edits=sort_edits(edits))
    digest = format.save(replace(saved, header=replace(saved.header, canary={})), path)
    back = format.load(path)
    assert back.digest == digest
    assert [edit.name for edit in back.edits] == [edit.name for edit in sort_edits(edits)]
    assert some.eps(base, PROMPTS, back.edits).equal(some.eps(base, PROMPTS, sort_edits(edits)))


def test_canonical_bytes(base: Base, tmp_path: Path) -> None:
    """One value, one sequence of bytes: however tensors are held and in whatever order things come."""
    first, second = some.erasure(base), some.erasure(base, [some.shared(base, seed=9)])
    paths = [tmp_path / f"{n}{format.SUFFIX}" for n in (1, 2)]
    for path, one in zip(paths, (first, second), strict=True):
        format.save(one, path)
    one, two = (format.load(path) for path in paths)
    assert format.dumps(stack([one, two])) == format.dumps(stack([two, one, two]))
    held = [replace(edit, tensors=_held(edit), sites=edit.sites[::-1]) for edit in one.edits[::-1]]
    assert format.dumps(replace(one, edits=sort_edits(held))) == paths[0].read_bytes()


def _held(edit: Edit) -> dict[str, torch.Tensor]:
    """The tensors as a method that trained them would hand them in: parameters, transposed views."""
    return {
        slot: torch.nn.Parameter(value.T.contiguous().T, requires_grad=True)
        for slot, value in reversed(edit.tensors.items())
    }


@few
@given(stacks(MAKERS), st.sampled_from(sorted(MAKERS)))
def test_a_closed_gate_is_an_absent_edit(base: Base, drawn: list, name: str) -> None:
    edits = [made(base, *one) for one in drawn]
    closed = replace(MAKERS[name](base, seed=77), gates=(some.shut(),))
    assert some.eps(base, PROMPTS, [*edits, closed]).equal(some.eps(base, PROMPTS, edits))
    assert some.eps(base, PROMPTS, [closed]).equal(plain(base))


@pytest.mark.parametrize("gate", ["match", "sight"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_prompts_that_open_no_gate_keep_their_bits(base: Base, name: str, gate: str) -> None:
    gated = made(base, name, 0, gate)
    assert some.eps(base, some.OTHER, [gated]).equal(plain(base, some.OTHER))
    assert not some.eps(base, some.ASKED, [gated]).equal(plain(base, some.ASKED))


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_steers_or_raises(sd1: Base, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides, "steer", lambda ledger, module, named, output: output)
    with pytest.raises(SilentEditError, match="did not steer"):
        some.eps(sd1, PROMPTS, [made(sd1, name, 0)])
    closed = replace(made(sd1, name, 0), gates=(some.shut(),))
    assert some.eps(sd1, PROMPTS, [closed]).equal(plain(sd1))


@pytest.mark.parametrize("name", sorted(set(MAKERS) - set(GUIDES)))
def test_every_edit_fires_or_raises(base: Base, name: str) -> None:
    edit = made(base, name, 0)
    with pytest.raises(SilentEditError, match="never run"), attached(base.unet, [edit]):
        pass
    path = edit.sites[-1].removeprefix("unet.")
    parent, child = base.unet.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    module = getattr(parent, child)
    attachment = Attachment(base.unet, [edit])
    try:
        setattr(parent, child, _rebuilt(find_module(base.unet, edit.sites[-1])))
        with pytest.raises(SilentEditError, match="did not run"):
            base.eps(base.noise([0]), some.TIME, base.encode(["a cat"]))
    finally:
        setattr(parent, child, module)
        attachment.remove()


def _rebuilt(module: torch.nn.Module) -> torch.nn.Module:
    """A layer of the same weights, as another library would put it in place."""
    new = copy.deepcopy(module)
    for part in new.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._forward_hooks_with_kwargs.clear()
        part._forward_pre_hooks_with_kwargs.clear()
    return new
