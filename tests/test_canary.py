"""The self-test in every file, and that no hook can be lost without anybody noticing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch

from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure, Gate, stack, token_count
from conceptzap.errors import FormatError, RefusedError
from conceptzap.runtime import adapters, ops
from conceptzap.runtime.attach import Attachment
from conceptzap.runtime.hooks import LayerHook
from conceptzap.testing import tiny
from conceptzap.trust import canary
from conceptzap.verbs import erasing


def refused(base: Base, erasure: Erasure, **options: bool) -> str:
    with pytest.raises(RefusedError) as caught:
        canary.check(base, erasure, **options)
    assert caught.value.exit_code == 6 and caught.value.hint
    return str(caught.value)


def altered(erasure: Erasure, change: Any) -> Erasure:
    """With what `change(numbers)` returns in place of the canary's numbers."""
    test = {name: one | {"change": change(one["change"])} for name, one in erasure.header.canary.items()}
    return replace(erasure, header=replace(erasure.header, canary=test))


def test_passes_on_the_base_it_was_made_on(base: Base, tmp_path: Path) -> None:
    erasure = some.erasure(base)
    numbers = next(iter(erasure.header.canary.values()))["change"]
    assert set(numbers) == {site for edit in erasure.edits for site in edit.sites}
    format.save(erasure, tmp_path / f"one{format.SUFFIX}")
    hooks = some.hooks(base)
    canary.check(base, format.load(tmp_path / f"one{format.SUFFIX}"))
    assert some.hooks(base) == hooks


@pytest.mark.parametrize("name", range(5))
def test_covers_every_op(sd1: Base, name: int) -> None:
    makers = (some.tokens, some.key_values, some.mask, some.delta, some.adapter)
    edit = makers[name](sd1, gates=[some.window(100, 300), some.gate(sd1)])
    canary.check(sd1, some.erasure(sd1, [edit]))


def test_of_a_gate_that_looks_is_made_where_it_looks(sd1: Base) -> None:
    """At its first time: the call opens it and is made again under the edit; a stronger probe is found."""
    gate = some.always(sd1, (-1.0, 1.0), (100.0, 900.0))
    erasure = some.erasure(sd1, [some.tokens(sd1, gates=[gate])])
    canary.check(sd1, erasure)
    blind = replace(gate, params=gate.params | {"threshold": 2.0})
    edits = tuple(replace(edit, gates=(blind,)) for edit in erasure.edits)
    tests = {edits[0].name: one | {"edits": [edits[0].name]} for one in erasure.header.canary.values()}
    shut = replace(erasure, edits=edits, header=replace(erasure.header, canary=tests))
    assert "self-test failed" in refused(sd1, shut)


def test_a_stack_carries_every_self_test(sd1: Base) -> None:
    parts = [some.erasure(sd1), some.erasure(sd1, [some.adapter(sd1)])]
    both = stack([replace(one, digest=str(n)) for n, one in enumerate(parts)])
    canary.check(sd1, both)
    lost = replace(both, header=replace(both.header, canary=parts[0].header.canary))
    assert "no self-test" in refused(sd1, lost)


def test_many_are_tested_in_one_call(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a row of its own, with the numbers of a call of its own: rows, keys and values included."""
    gate = [some.gate(base)]
    cases = [
        canary.Case(some.eraser(base), some.ASKED[1]),
        canary.Case((some.tokens(base, n=2, seed=4), some.shared(base, seed=5)), some.OTHER[1]),
        canary.Case((some.adapter(base, gates=[some.window(0, 300)]),), some.OTHER[2]),
        canary.Case((some.eraser(base)[0], some.mask(base, gates=gate)), some.ASKED[0]),
    ]
    alone = [canary.measure(base, [case])[0] for case in cases]
    calls, eps = [], Base.eps
    monkeypatch.setattr(Base, "eps", lambda *given: calls.append(len(given[1])) or eps(*given))
    together = canary.measure(base, cases)
    assert calls == [4]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, rel=1e-3) and all(value > 0 for value in one.values())
    calls.clear()
    monkeypatch.setattr(canary, "ROWS", 3)
    assert canary.measure(base, cases)[3] == pytest.approx(alone[3], rel=1e-3) and calls == [3, 1]


def test_fewer_at_once_where_memory_runs_out(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, eps = [], Base.eps

    def small(base: Base, latents: torch.Tensor, *given: Any) -> torch.Tensor:
        rows.append(len(latents))
        if len(latents) > 2:
            raise MemoryError
        return eps(base, latents, *given)

    cases = [canary.Case((some.shared(sd1, seed=seed),), "a cat") for seed in range(5)]
    wanted = [canary.measure(sd1, [case])[0] for case in cases]
    monkeypatch.setattr(Base, "eps", small)
    for one, other in zip(canary.measure(sd1, cases), wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert rows == [5, 4, 2, 2, 1]


@pytest.mark.parametrize("strength", [0.5, 0.3, 2.0])
def test_of_an_erasure_made_weaker_or_stronger(sd1: Base, tmp_path: Path, strength: float) -> None:
    """What `scaled` gives can be saved, loaded and drawn; it has lost the scores it did not earn."""
    made = some.erasure(sd1)
    scores = {"leak": {"value": 0.0, "low": 0.0, "high": 5.0, "n": 60}}
    made = format.seal(replace(made, header=replace(made.header, scores=scores)))
    scaled = made.scaled(strength)
    assert scaled != made and made.scaled(1) is made
    assert scaled.scaled(0.5).edits == made.scaled(strength / 2).edits
    format.save(scaled, tmp_path / f"half{format.SUFFIX}")
    back = format.load(tmp_path / f"half{format.SUFFIX}")
    assert back == scaled and back.digest not in ("", made.digest) and not back.header.scores
    canary.check(sd1, back)
    hollow = [replace(e, tensors={s: t * 0.5 for s, t in e.tensors.items()}) for e in back.edits]
    refused(sd1, replace(back, edits=tuple(hollow)))
    refused(sd1, made.scaled(0))
    refused(sd1, replace(made, edits=made.scaled(0).edits))


@pytest.mark.parametrize("factor", [0.9, 1.1, 2.0, 0.0, -1.0])
def test_altered_numbers_fail(sd1: Base, factor: float) -> None:
    erasure = some.erasure(sd1)
    for site in next(iter(erasure.header.canary.values()))["change"]:
        wrong = altered(erasure, lambda numbers, s=site: numbers | {s: numbers[s] * factor})
        assert f"self-test failed at {site}" in refused(sd1, wrong)


def test_numbers_left_out_or_made_up_fail(sd1: Base) -> None:
    erasure = some.erasure(sd1)
    refused(sd1, altered(erasure, lambda numbers: {}))
    refused(sd1, altered(erasure, lambda numbers: dict(list(numbers.items())[1:])))
    refused(sd1, altered(erasure, lambda numbers: numbers | {"unet.conv_in": 0.0}))


@pytest.mark.parametrize("exact", [True, False])
def test_a_neutralised_edit_fails(sd1: Base, exact: bool) -> None:
    """Also when the stored numbers say that nothing is to be expected."""
    erasure = some.erasure(sd1, [some.shared(sd1)])
    edit = erasure.edits[0]
    hollow = replace(edit, tensors={slot: torch.zeros_like(t) for slot, t in edit.tensors.items()})
    test = next(iter(erasure.header.canary.values())) | {"edits": [hollow.name]}
    header = replace(erasure.header, canary={hollow.name: test})
    dead = replace(erasure, header=header, edits=(hollow,))
    refused(sd1, dead, exact=exact)
    refused(sd1, altered(dead, lambda numbers: dict.fromkeys(numbers, 0.0)), exact=exact)


def test_is_not_made_of_an_edit_that_does_nothing(sd1: Base) -> None:
    idle = [
        some.shared(sd1, gates=[some.window(0, 400), some.window(600, 999)]),
        replace(some.shared(sd1), scale=0.0),
        Edit("weight", some.low_rank(sd1).sites, {"delta": some.delta(sd1).tensors["delta"] * 0}),
    ]
    for edit in idle:
        with pytest.raises(RefusedError):
            canary.make(sd1, [edit], some.ASKED[0])
    with pytest.raises(RefusedError, match="changes nothing"):
        canary.make(sd1, some.eraser(sd1), some.OTHER[1])


def test_another_checkpoint_need_not_agree_but_must_act(sd1: Base) -> None:
    erasure, other = some.erasure(sd1, [some.shared(sd1), some.tokens(sd1)]), tiny("sd1", seed=1)
    canary.check(other, erasure, exact=False)
    assert "was expected" in refused(other, erasure)


@pytest.mark.parametrize("kind", ["eraser", "adapter", "sight"])
def test_any_single_hook_switched_off_is_refused(base: Base, kind: str) -> None:
    """Each handle in turn, after a call in which all was well."""
    edits = {
        "eraser": some.eraser, "adapter": lambda base: (some.adapter(base), some.low_rank(base, some.CONVS)),
        "sight": lambda base: (some.tokens(base, gates=[some.sight(base)]),),
    }[kind](base)  # fmt: skip
    latents, cond = base.noise([0, 1]), base.encode([some.ASKED[0], some.OTHER[0]])
    count = len(_handles(base, edits))
    assert count >= len({site for edit in edits for site in edit.sites}) + 2
    for number in range(count):
        attachment = Attachment(base.unet, edits)
        try:
            with torch.no_grad():
                base.eps(latents, some.TIME, cond)
                attachment._handles[number].remove()
                with pytest.raises(RefusedError) as caught:
                    base.eps(latents, some.TIME, cond)
            assert caught.value.exit_code == 6
            assert attachment.receipt.calls == 1
        finally:
            attachment.remove()


def of_pairs(base: Base) -> Gate:
    """Open for every pair, and for no row alone."""
    always = some.always(base)
    double = torch.zeros(1, 2 * always.tensors["query"].shape[-1])
    return replace(always, tensors=always.tensors | {"query": double, "alone": -always.tensors["offset"]})


def test_what_acts_in_text_is_tested_beside_pairs(base: Base) -> None:
    """In one file and in two: the encoders read the unconditional rows in the same call."""
    looks, text = some.tokens(base, gates=[of_pairs(base)]), some.in_text(base)
    files = [some.erasure(base, edits) for edits in ([text], [looks, some.shared(base)], [looks, text])]
    canary.check_all(base, [(one, True) for one in files])
    alone = canary.measure(base, [canary.Case((text,), some.ASKED[0])])[0]
    beside = canary.measure(base, [canary.Case((text,), some.ASKED[0]), canary.Case((looks,), some.ASKED[0])])[0]
    assert beside == pytest.approx(alone, rel=1e-4)


def test_a_gate_of_pairs_is_tested_as_one(sd1: Base) -> None:
    """It opens beside the unconditional row and not alone, as it may where pictures are drawn."""
    edit = some.tokens(sd1, gates=[of_pairs(sd1)])
    (test,) = canary.make(sd1, [edit], some.ASKED[0]).values()
    (free,) = canary.make(sd1, [replace(edit, gates=())], some.ASKED[0]).values()
    assert test["change"].keys() == free["change"].keys()
    canary.check(sd1, some.erasure(sd1, [edit, some.shared(sd1)]))


def _handles(base: Base, edits: tuple[Edit, ...]) -> list[Any]:
    attachment = Attachment(base.unet, edits)
    handles = list(attachment._handles)
    attachment.remove()
    return handles


def _nothing(*given: Any) -> torch.Tensor:
    return torch.zeros_like(given[-1])


@pytest.mark.parametrize(
    ("maker", "owner", "name"),
    [
        (some.shared, ops, "low_rank"),
        (some.low_rank, ops, "low_rank"),
        (some.mask, ops, "masked"),
        (some.delta, ops, "dense"),
        (some.adapter, adapters, "change"),
        (some.beside, adapters, "change"),
        (some.skip, LayerHook, "_adapted"),
        (some.tokens, LayerHook, "_prompt"),
        (some.key_values, LayerHook, "_rows"),
    ],
)
def test_an_effect_that_does_not_arrive_is_found(
    sd1: Base, monkeypatch: pytest.MonkeyPatch, maker: Any, owner: Any, name: str
) -> None:
    """Every hook runs and its receipt is in order, only nothing comes of it."""
    erasure = some.erasure(sd1, [maker(sd1)])
    canary.check(sd1, erasure)
    mutes = {
        "_prompt": lambda hook, call, index, x: x.new_zeros(
            len(x), token_count(hook.ledger.edits[index]), x.shape[2]
        ),
        "_rows": lambda hook, call, learned, output, start: [output[:, start:]],
        "low_rank": lambda pair, strength, module, x: torch.zeros_like(x if module is None else module.forward(x)),
        "dense": lambda part, module, x: torch.zeros_like(module.forward(x)),
        "change": lambda part, path, module, x, y, times: torch.zeros_like(y),
        "_adapted": lambda hook, call, index, module, x, y: torch.zeros_like(x),
        "masked": lambda parts, strengths, module, x: torch.zeros_like(module.forward(x)),
    }
    monkeypatch.setattr(owner, name, mutes.get(name, _nothing))
    assert "self-test failed" in refused(sd1, erasure)


def test_edits_that_act_on_different_prompts_are_tested_by_their_own(sd1: Base) -> None:
    """One test where one prompt moves them all, else one for each prompt; none is left untested."""
    gated, always = some.shared(sd1, gates=[some.gate(sd1)]), some.low_rank(sd1)
    asked, other = some.ASKED[1], some.OTHER[1]
    assert list(erasing._tests(sd1, [gated, always], [asked, other])) == sorted([gated.name, always.name])[:1]
    found = erasing._tests(sd1, [gated, always], [other, asked])
    assert {test["prompt"]: test["edits"] for test in found.values()} == {other: [always.name], asked: [gated.name]}
    with pytest.raises(RefusedError, match="changes nothing"):
        erasing._tests(sd1, [gated, always], [other, ""])


@contextmanager
def convolving(base: Base) -> Iterator[list[int]]:
    """Grows by one for each call that goes through the whole UNet."""
    found: list[int] = []
    handle = base.unet.conv_in.register_forward_pre_hook(lambda *_: found.append(1))
    yield found
    handle.remove()


def test_of_what_reads_pooled_text_no_more_runs_than_that(sdxl: Base) -> None:
    """SDXL's embedding of pooled text and sizes, beside its cross-attentions."""
    edit = some.low_rank(sdxl, "unet.add_embedding.linear_1")
    with convolving(sdxl) as whole:
        erasure = some.erasure(sdxl, [edit, some.shared(sdxl)])
        canary.check(sdxl, erasure)
        assert not whole
    test = next(iter(erasure.header.canary.values()))
    assert test["runs"] == "text" and set(edit.sites) < test["change"].keys()
    hollow = replace(edit, tensors={slot: tensor * 0.5 for slot, tensor in edit.tensors.items()})
    names = {edit.name: hollow.name}
    tests = {n: one | {"edits": sorted(names.get(e, e) for e in one["edits"])}
             for n, one in erasure.header.canary.items()}  # fmt: skip
    edits = tuple(hollow if one == edit else one for one in erasure.edits)
    weaker = replace(erasure, edits=edits, header=replace(erasure.header, canary=tests))
    assert "add_embedding" in refused(sdxl, weaker)


def test_only_cross_attentions_run_for_what_is_in_them_and_reads_text(sd1: Base) -> None:
    with convolving(sd1) as whole:
        erasure = some.erasure(sd1, some.eraser(sd1))
        test = next(iter(erasure.header.canary.values()))
        assert test["runs"] == "text" and not whole
        canary.check(sd1, erasure)
        assert not whole and "forward" not in vars(sd1.unet)
        beside = some.erasure(sd1, [some.adapter(sd1)])
        assert whole and "runs" not in next(iter(beside.header.canary.values()))


def test_made_before_they_ran_alone_or_forged_to_has_the_whole_unet_run(sd1: Base) -> None:
    """Numbers of the one are not taken for those of the other."""
    erasure, outside = some.erasure(sd1, some.eraser(sd1)), some.erasure(sd1, [some.adapter(sd1)])
    old = {name: {k: v for k, v in one.items() if k != "runs"} for name, one in erasure.header.canary.items()}
    forged = {name: one | {"runs": "text"} for name, one in outside.header.canary.items()}
    with convolving(sd1) as whole:
        refused(sd1, replace(erasure, header=replace(erasure.header, canary=old)))
        assert len(whole) == 1
        canary.check(sd1, replace(outside, header=replace(outside.header, canary=forged)))
        assert len(whole) == 2


def test_weights_that_are_moved_in_are(sd1: Base) -> None:
    """Offloading wraps the UNet's forward, and goes on doing so."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Moved(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            moved.append(1)
            return args, kwargs

    moved: list[int] = []
    erasure = some.erasure(sd1, some.eraser(sd1))
    add_hook_to_module(sd1.unet, Moved())
    canary.check(sd1, erasure)
    assert len(moved) == 1
    sd1.eps(sd1.noise([0]), 500, sd1.encode(["a cat"]))
    assert len(moved) == 2
    remove_hook_from_module(sd1.unet)


def test_a_test_that_does_not_say_how_much_text_it_read_read_a_multiple_of_16(sd1: Base) -> None:
    edit = some.shared(sd1)
    erasure = some.erasure(sd1, [edit])

    def tested(test: dict[str, Any]) -> Erasure:
        return replace(erasure, header=replace(erasure.header, canary={edit.name: test}))

    test = canary.make(sd1, [edit], "a cat")[edit.name]
    assert test["length"] == 8
    canary.check(sd1, tested(test))
    older = canary._case(sd1, [edit], "a cat", canary.OLD_STEP)
    change = canary.measure(sd1, [older])[0]
    silent = {key: value for key, value in test.items() if key != "length"} | {"change": change}
    canary.check(sd1, tested(silent))
    assert refused(sd1, tested(test | {"length": 16})) and refused(sd1, tested(test | {"change": change}))
    for wrong in (0, 78, "8"):
        with pytest.raises(FormatError, match="length"):
            format.seal(tested(test | {"length": wrong}))


@pytest.mark.parametrize("prompt", ["a cat", "a " * 20 + "cat", "a " * 90])
def test_as_much_of_the_text_is_read_as_holds_the_prompt(base: Base, prompt: str) -> None:
    """What the gates say of that much is what they say of the whole."""
    case = canary._case(base, [some.shared(base, gates=[some.gate(base)])], prompt)
    assert base.token_count(prompt) + 2 <= case.length <= base.max_tokens + 2 or len(prompt) > 100
    beside = [canary.Case(case.edits, "a dog", canary.POSITIONS), case]
    assert canary.measure(base, beside)[1] == pytest.approx(canary.measure(base, [case])[0], rel=1e-3)


def test_a_self_test_asks_for_the_first_prompt_that_opens_its_gate(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone or among many that are looked at together."""
    edits, shut = some.eraser(sd1), some.OTHER[1:]
    for together in (1, 2, 32):
        monkeypatch.setattr(erasing, "TOGETHER", together)
        for asked in (some.ASKED, [*shut, *some.ASKED], [*shut, *reversed(some.ASKED)]):
            first = next(text for text in asked if text in some.ASKED)
            assert erasing._opening(sd1, edits, asked) == first
        assert erasing._opening(sd1, edits, shut) is erasing._opening(sd1, edits, shut[:1]) is None
