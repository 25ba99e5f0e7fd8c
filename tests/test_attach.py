"""Attaching: rows of one call kept apart, books that balance, and refusal of every way around."""

from __future__ import annotations

import copy
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import edits as some
import pytest
import torch

from conceptzap.base import CROSS, CROSS_K, Base, find_module
from conceptzap.errors import MismatchError, RefusedError, SilentEditError
from conceptzap.runtime.attach import Attachment, attached
from conceptzap.runtime.ledger import Ledger

MIXED = (some.ASKED[0], some.OTHER[0], some.ASKED[1], some.OTHER[1])
BOTH = (some.tokens, some.shared)


def call(base: Base, **more: Any) -> Any:
    """One raw UNet call for a prompt that names the concept and one that does not."""
    states = base.encode(MIXED[:2]).states
    given = {"encoder_hidden_states": states, "sample": base.noise([0, 1]), "timestep": some.TIME, **more}
    with torch.no_grad():
        return base.unet(**given).sample


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("kind", ["both", "rows", "pair"])
def test_each_row_of_a_mixed_call_is_as_if_alone(base: Base, kind: str, n: int) -> None:
    chosen = {"both": BOTH, "rows": BOTH[:1], "pair": BOTH[1:]}[kind]
    edits = [make(base, gates=[some.gate(base)]) for make in chosen]
    mixed, latents, cond = some.eps(base, MIXED[:n], edits), base.noise(range(n)), base.encode(MIXED)
    for row in range(n):
        with attached(base.unet, edits), torch.no_grad():
            alone = base.eps(latents[[row]], some.TIME, cond[row])
        with torch.no_grad():
            plain = base.eps(latents[[row]], some.TIME, cond[row])
        assert some.far(mixed[[row]], alone) < 1e-5
        assert alone.equal(plain) == (row % 2 == 1)


def test_two_erasures_open_for_different_rows(base: Base) -> None:
    """Each acts on its own rows of a call, with its own timesteps."""
    gated = some.tokens(base, gates=[some.gate(base)])
    early = some.tokens(base, n=2, seed=5, gates=[some.window(600, 999)])
    latents, cond = base.noise(range(4)), base.encode(MIXED)
    times = torch.tensor([700, 700, 300, 300])
    with attached(base.unet, [gated, early]) as receipt, torch.no_grad():
        mixed = base.eps(latents, times, cond)
    acting = ([gated, early], [early], [gated], [])
    for row, edits in enumerate(acting):
        ungated = [replace(edit, gates=()) for edit in edits]
        with attached(base.unet, ungated) if ungated else attached(base.unet, []), torch.no_grad():
            alone = base.eps(latents[[row]], times[[row]], cond[row])
        assert some.far(mixed[[row]], alone) < 1e-5
    assert [sorted(tally.opened) for tally in receipt.tallies] == [[0, 2], [0, 1]]


def test_the_receipt_accounts_for_every_row(base: Base) -> None:
    edits = [some.tokens(base, gates=[some.gate(base)]), some.low_rank(base), some.shared(base, gates=[some.shut()])]
    with attached(base.unet, edits) as receipt, torch.no_grad():
        for n in (1, 4, 3):
            base.eps(base.noise(range(n)), some.TIME, base.encode(MIXED[:n]))
    assert (receipt.calls, receipt.rows) == (3, 8)
    assert [(t.open, t.shut, t.fired) for t in receipt.tallies] == [(5, 3, True), (8, 0, True), (0, 8, False)]
    assert receipt.by_name[edits[0].name].opened == {0: 3, 2: 2}
    receipt.verify(3)
    with pytest.raises(SilentEditError):
        receipt.verify(4)


def test_a_mask_of_the_caller_is_lengthened(sd1: Base) -> None:
    """A caller who masks the padding gets what a prompt without the padding gives."""
    edits = [some.tokens(sd1), some.shared(sd1)]
    states, latents = sd1.encode(MIXED[:2]).states, sd1.noise([0, 1])
    seen = torch.ones(2, states.shape[1])
    seen[:, 20:] = 0
    with attached(sd1.unet, edits):
        masked = call(sd1, encoder_attention_mask=seen)
        short = call(sd1, encoder_hidden_states=states[:, :20])
    assert some.far(masked, short) < 1e-4
    assert some.far(call(sd1, encoder_attention_mask=seen, sample=latents), masked) > 1e-4


def test_arguments_may_be_positional(sd1: Base) -> None:
    with attached(sd1.unet, some.eraser(sd1)) as receipt, torch.no_grad():
        named = call(sd1)
        given = (sd1.noise([0, 1]), some.TIME, sd1.encode(MIXED[:2]).states)
        assert sd1.unet(*given).sample.equal(named) and sd1.unet(*given, return_dict=False)[0].equal(named)
        with pytest.raises(RefusedError, match="beside them"):
            sd1.unet(*given, None, None, None, None, {"image_embeds": [torch.zeros(2, 1, 4)]})
    assert receipt.calls == 3


REFUSED = {
    "no text": {"encoder_hidden_states": None},
    "an image prompt": {"added_cond_kwargs": {"image_embeds": [torch.zeros(2, 1, 4)]}},
    "grounding": {"cross_attention_kwargs": {"gligen": {}}},
    "a text for more rows": {"sample": torch.zeros(1, 4, 8, 8)},
    "a text for fewer rows": {"sample": torch.zeros(4, 4, 8, 8)},
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_way_around_the_text_is_refused(sd1: Base, case: str) -> None:
    with attached(sd1.unet, some.eraser(sd1)):
        call(sd1)
        with pytest.raises(RefusedError) as caught:
            call(sd1, **REFUSED[case])
        assert caught.value.exit_code == 6 and caught.value.hint
        call(sd1)


def test_text_beside_an_image_at_a_cross_attention_is_refused(sd1: Base) -> None:
    """As image prompts hand it in below the UNet's own arguments."""
    module = sd1.module(sd1.sites(CROSS)[-1])
    with attached(sd1.unet, some.eraser(sd1)):
        call(sd1)

        def beside(module: Any, args: tuple, kwargs: dict) -> Any:
            return args, kwargs | {"encoder_hidden_states": (kwargs["encoder_hidden_states"], [])}

        handle = module.register_forward_pre_hook(beside, with_kwargs=True, prepend=True)
        with pytest.raises(RefusedError):
            call(sd1)
        handle.remove()


def test_calling_around_the_hooks_is_refused(base: Base) -> None:
    latents, cond = base.noise([0]), base.encode([some.ASKED[0]])
    attachment = Attachment(base.unet, some.eraser(base))
    try:
        with torch.no_grad():
            base.eps(latents, some.TIME, cond)
            with pytest.raises(RefusedError, match="outside its model"):
                base.unet.forward(latents, some.TIME, cond.states, added_cond_kwargs=_added(cond))
            with pytest.raises(RefusedError, match="outside its model"):
                base.module(base.sites(CROSS_K)[0])(cond.states)
    finally:
        attachment.remove()


def _added(cond: Any) -> dict[str, torch.Tensor] | None:
    return None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_layer_that_runs_once_more_is_refused(sd1: Base, rows: int) -> None:
    states = sd1.encode(MIXED[:rows]).states
    cross = sd1.module(sd1.sites(CROSS)[0])
    with attached(sd1.unet, some.eraser(sd1)):
        call(sd1)
        handle = cross.register_forward_hook(lambda module, args, output: void(module.to_k(states)))
        try:
            with pytest.raises(SilentEditError, match="of 2 rows|without being entered"):
                call(sd1)
        finally:
            handle.remove()


def void(_: object) -> None:
    """For hooks that leave the output alone."""


def test_one_call_at_a_time(sd1: Base) -> None:
    """A second thread must not lend its prompt's gates to the call that is under way."""
    raised: list[Exception] = []

    def interrupt(module: Any, args: Any) -> None:
        thread = Thread(target=lambda: raised.append(_error(lambda: call(sd1, timestep=1))))
        if not raised:
            raised.append(RuntimeError("entered"))
            thread.start()
            thread.join()

    alone = some.eps(sd1, MIXED[:2], some.eraser(sd1))
    with attached(sd1.unet, some.eraser(sd1)) as receipt:
        handle = sd1.unet.conv_in.register_forward_pre_hook(interrupt)
        assert call(sd1).equal(alone)
        handle.remove()
    assert isinstance(raised[1], RefusedError) and "threads" in str(raised[1])
    assert receipt.calls == 1


def test_two_threads_that_ask_at_the_same_moment(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second asks while the first reads its gates: past the question, before its first module."""
    reading, go_on = Event(), Event()
    read = Ledger._read

    def slowly(ledger: Ledger, *given: Any) -> Any:
        if not reading.is_set():
            reading.set()
            go_on.wait(60)
        return read(ledger, *given)

    alone, drawn = some.eps(sd1, MIXED[:2], some.eraser(sd1)), []
    monkeypatch.setattr(Ledger, "_read", slowly)
    with attached(sd1.unet, some.eraser(sd1)) as receipt:
        first = Thread(target=lambda: drawn.append(call(sd1)))
        first.start()
        assert reading.wait(60)
        raised = _error(lambda: call(sd1))
        go_on.set()
        first.join()
        assert isinstance(raised, RefusedError) and "threads" in str(raised)
        assert drawn[0].equal(alone) and receipt.calls == 1
        assert call(sd1).equal(alone)


def _error(run: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    return caught.value


def test_a_call_that_failed_blocks_nobody(sd1: Base) -> None:
    def fail(*given: Any) -> None:
        raise MemoryError

    with attached(sd1.unet, some.eraser(sd1)) as receipt:
        handle = sd1.unet.conv_out.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            call(sd1)
        handle.remove()
        drawn: list[Any] = []
        thread = Thread(target=lambda: drawn.append(call(sd1)))
        thread.start()
        thread.join()
    assert drawn[0].equal(some.eps(sd1, MIXED[:2], some.eraser(sd1)))
    assert receipt.calls == 1


def test_attaching_twice_is_refused(sd1: Base) -> None:
    with attached(sd1.unet, [some.shared(sd1)]):
        for unet in (sd1.unet, copy.deepcopy(sd1.unet)):
            with pytest.raises(RefusedError, match="already"):
                Attachment(unet, some.eraser(sd1))
        call(sd1)


def test_an_error_inside_takes_the_hooks_off(sd1: Base) -> None:
    hooks = some.hooks(sd1)
    with pytest.raises(KeyError), attached(sd1.unet, some.eraser(sd1)):
        raise KeyError
    assert some.hooks(sd1) == hooks


def test_a_copy_is_erased_on_its_own(sd1: Base) -> None:
    attachment = Attachment(sd1.unet, some.eraser(sd1))
    erased = call(sd1)
    other = replace(sd1, unet=copy.deepcopy(sd1.unet))
    attachment.remove()
    assert call(other).equal(erased) and not call(sd1).equal(erased)
    assert attachment.receipt.calls == 1


MAKERS = {
    "rows": some.tokens,
    "key rows": some.key_values,
    "shared": some.shared,
    "low rank": some.low_rank,
    "delta": some.delta,
    "adapter": some.adapter,
    "block": some.beside,
    "skip": some.skip,
}


def gradients(sd1: Base, name: str, checkpointing: bool, dtype: torch.dtype = torch.float32) -> list:
    """Of a gated edit of that kind, beside a second of its kind that is not trained."""
    base = replace(sd1, unet=copy.deepcopy(sd1.unet).to(dtype), dtype=dtype)
    edit = MAKERS[name](base, gates=[some.gate(sd1)])
    tensors = {slot: torch.nn.Parameter(t) for slot, t in edit.tensors.items()}
    if checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    with attached(base.unet, [replace(edit, tensors=tensors), MAKERS[name](base, seed=9)]) as receipt:
        cond = base.encode(MIXED[:2])
        base.eps(base.noise([0, 1]), some.TIME, cond).pow(2).mean().backward()
        receipt.verify(1)
    return [tensors[slot].grad for slot in sorted(tensors)]


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_gradients_reach_the_edits(sd1: Base, name: str) -> None:
    """Checkpointing runs modules once more during backward; the gradients are the same."""
    plain, again = (gradients(sd1, name, checkpointing) for checkpointing in (False, True))
    for one, two in zip(plain, again, strict=True):
        assert one.abs().max() > 0 and torch.allclose(one, two, rtol=1e-3, atol=1e-7)


def test_gradients_flow_through_a_cast(sd1: Base) -> None:
    """Parameters in fp32 on a UNet in bf16: cast inside the graph."""
    for one, two in zip(*(gradients(sd1, "shared", False, t) for t in (torch.float32, torch.bfloat16)), strict=True):
        assert two.dtype == torch.float32 and torch.cosine_similarity(one.flatten(), two.flatten(), 0) > 0.98


def test_find_module(sd1: Base) -> None:
    site = sd1.sites(CROSS_K)[0]
    assert find_module(sd1.unet, site) is sd1.module(site)
    for wrong in (site.removeprefix("unet."), f"{site}.weight", "unet.nowhere", "vae.encoder"):
        with pytest.raises(MismatchError, match="has no module"):
            find_module(sd1.unet, wrong)
