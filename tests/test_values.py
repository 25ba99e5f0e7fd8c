"""Values: equal by content, hashable, named once, and short to look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import edits as some
import pytest
import torch

from conceptzap import edit as nouns
from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Gate
from conceptzap.errors import RefusedError, UsageError
from conceptzap.runtime.attach import attached
from conceptzap.runtime.hooks import LayerHook
from conceptzap.trust import admission


def test_two_loads_of_a_file_are_equal(sd1: Base, tmp_path: Path) -> None:
    path = tmp_path / f"one{format.SUFFIX}"
    made = some.erasure(sd1)
    format.save(made, path)
    one, two = format.load(path), format.load(path)
    assert one == two == made and len({one, two, made}) == 1
    assert one.edits == two.edits and one.edits[0].gates == two.edits[0].gates
    other = some.erasure(sd1, [some.shared(sd1)])
    retitled = replace(one, header=replace(one.header, title="another"))
    for different in (other, retitled, one.scaled(0.5), one.digest, None):
        assert one != different and different != one
    assert one.edits[0] != one.edits[1] and one.edits[0] != one.edits[0].gates[0]


def test_repr_is_one_short_line(sd1: Base) -> None:
    made = format.seal(some.erasure(sd1))
    with attached(sd1.unet, made.edits) as receipt:
        some_eps = sd1.eps(sd1.noise([0]), some.TIME, sd1.encode([some.ASKED[0]]))
    assert some_eps.shape and repr(receipt) == "Receipt(1 calls, 1 rows, 2 of 2 edits fired)"
    assert repr(made).startswith("Erasure(van gogh to painting: 2 edits for sd1, ")
    for value in (made, *made.edits, made.edits[0].gates[0], receipt):
        assert len(repr(value)) < 160 and "\n" not in repr(value) and "tensor" not in repr(value)


def test_a_name_is_hashed_once_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, content_name = [], nouns.content_name
    monkeypatch.setattr(nouns, "content_name", lambda *given: hashed.append(1) or content_name(*given))
    gate = Gate("match", {"threshold": 1.0}, {"query": torch.ones(2, 4), "mean": torch.zeros(4)})
    edit = Edit("weight", ("unet.a",), {"delta": torch.ones(2, 2)}, gates=(gate,))
    names = {edit.name for _ in range(3)}
    assert len(hashed) == 2 and len(names) == 1
    edit.tensors["delta"].add_(1)
    gate.tensors["mean"].add_(1)
    names |= {edit.name, gate.name}
    assert len(names) == 3 and len(hashed) == 4
    trained = replace(edit, tensors={"delta": torch.nn.Parameter(torch.ones(2, 2))})
    before = trained.name
    with torch.no_grad():
        trained.tensors["delta"].data.add_(1)
    assert trained.name != before


def test_learned_rows_count_when_they_are_open(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of gated files may be attached; only those that open together have to fit."""
    monkeypatch.setattr("conceptzap.trust.admission.MAX_ROWS", 8)
    monkeypatch.setattr("conceptzap.runtime.hooks.MAX_ROWS", 8)
    gated = [some.tokens(sd1, n=3, seed=seed, gates=[some.gate(sd1)]) for seed in range(4)]
    files = [some.erasure(sd1, [edit]) for edit in gated]
    assert len(admission.load_all(files)) == 4
    always = [some.erasure(sd1, [replace(edit, gates=())]) for edit in gated]
    assert len(admission.load_all(always[:2])) == 2
    with pytest.raises(UsageError, match="12 learned tokens"):
        admission.load_all(always)
    plain = some.eps(sd1, some.OTHER[:2])
    assert some.eps(sd1, some.OTHER[:2], gated).equal(plain)
    assert not some.eps(sd1, some.ASKED[:1], gated[:2]).equal(plain)
    with pytest.raises(RefusedError, match="12 learned tokens are open at once"):
        some.eps(sd1, some.ASKED[:1], gated)
    assert some.eps(sd1, some.OTHER[:2]).equal(plain) and not some.hooks(sd1)


@pytest.mark.parametrize("strength", [-0.1, 2.5, float("nan"), "1", None, True])
def test_a_strength_is_a_number_in_range(sd1: Base, strength: object) -> None:
    with pytest.raises(UsageError, match="out of range"):
        admission.load_all([(some.erasure(sd1), strength)])


def test_a_mask_is_a_multiple_of_8_long(sd1: Base) -> None:
    """As xformers wants it; what is spare is masked out. Without a mask nothing is added."""
    length, seen = sd1.encode(["a"]).states.shape[1], []
    gated, weak = some.tokens(sd1, gates=[some.gate(sd1)]), replace(some.tokens(sd1), scale=0.5)
    cross = sd1.module(gated.sites[0])
    for edits, n in (([gated], 2), ([weak], 2), ([gated, weak], 2), ([gated], 1)):
        with attached(sd1.unet, edits), torch.no_grad():
            handle = cross.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
            sd1.eps(sd1.noise(range(n)), some.TIME, sd1.encode([some.ASKED[0], some.OTHER[0]][:n]))
            handle.remove()
        learned = 3 * len(edits)
        states, mask = seen[-1]["encoder_hidden_states"], seen[-1]["attention_mask"]
        if n == 1:
            assert mask is None and states.shape[1] == length + 3
            continue
        assert mask.shape[2] % 8 == 0 and states.shape[1] == mask.shape[2]
        assert (mask[..., length + learned :] == -torch.inf).all() and mask.shape[2] - length - learned < 8


@pytest.mark.parametrize("n", [1, 2])
def test_offloaded_layer_by_layer(n: int) -> None:
    """Every op on weights that are on meta until their layer runs, and again after it."""
    from accelerate import cpu_offload

    from conceptzap.testing import tiny

    base = tiny("sd1")
    gate = [some.gate(base)]
    makers = (some.tokens, some.key_values, some.shared, some.low_rank, some.delta, some.adapter)
    edits = [maker(base, seed=i, gates=gate[: i % 2]) for i, maker in enumerate(makers)]
    edits += [some.mask(base), some.mask(base, some.CONVS), some.mask(base, seed=4, gates=gate)]
    prompts = [some.ASKED[0], some.OTHER[0]][:n]
    wanted = some.eps(base, prompts, edits)
    cpu_offload(base.unet, execution_device=torch.device("cpu"))
    assert next(base.unet.parameters()).is_meta
    assert some.eps(base, prompts, edits).equal(wanted)


def test_a_thousand_edits_are_one_question(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules look at the edits that act, not at all of them; the books still balance for each."""
    gates = [replace(some.gate(sd1), params={"threshold": 1e6 + n}) for n in range(500)]
    shut = [f(sd1, gates=[gate]) for gate in gates for f in (some.tokens, some.shared)]
    one = some.eraser(sd1)
    asked, change = [], LayerHook._low_rank
    monkeypatch.setattr(LayerHook, "_low_rank", lambda *given: asked.append(given[2]) or change(*given))
    with attached(sd1.unet, [*shut, *one]) as receipt, torch.no_grad():
        drawn = sd1.eps(sd1.noise([0, 1]), some.TIME, sd1.encode([some.ASKED[0], some.OTHER[0]]))
        assert set(map(len, asked)) == {1}
        sd1.eps(sd1.noise([0]), some.TIME, sd1.encode([some.OTHER[0]]))
    assert drawn.equal(some.eps(sd1, [some.ASKED[0], some.OTHER[0]], one))
    assert len(receipt.tallies) == 1002 and all(t.open + t.shut == 3 for t in receipt.tallies)
    assert receipt.fired() == {edit.name for edit in one} == receipt.fired((0,))
    assert receipt.fired((1, 7)) == frozenset()
