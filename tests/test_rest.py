"""Hooks that rest: a text that leaves every gate shut meets the plain modules from its second call on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import edits as some
import pytest
import torch
from torch import nn

from conceptzap.base import CROSS, CROSS_K, Base, Cond
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime.attach import Attachment


@pytest.fixture
def attachment(sd1: Base) -> Iterator[Attachment]:
    made = Attachment(sd1.unet, some.eraser(sd1))
    yield made
    made.remove()


@torch.no_grad()
def call(base: Base, cond: Cond, t: int = some.TIME, **more: Any) -> torch.Tensor:
    latents = base.noise(range(len(cond.states)))
    return base.unet(latents, t, encoder_hidden_states=cond.states, **more).sample


def ours(base: Base) -> list[list[int]]:
    """Keys of the hooks before and behind each module that has any."""
    return [list(h) for m in base.unet.modules() for h in (m._forward_pre_hooks, m._forward_hooks) if h]


class Spy:
    """How many hooks the first cross-attention had before it in each call."""

    def __init__(self, base: Base) -> None:
        cross, self.seen = base.module(base.sites(CROSS)[0]), []

        def look(*_: object) -> None:
            self.seen.append(len(cross._forward_pre_hooks))

        self.handle = base.unet.conv_in.register_forward_pre_hook(look)


def test_from_the_second_call_on(sd1: Base, attachment: Attachment) -> None:
    shut, asked, before = sd1.encode(some.OTHER[:2]), sd1.encode(some.ASKED[:2]), ours(sd1)
    spy, refused = Spy(sd1), pytest.raises(RefusedError, match="outside its model")
    drawn = [call(sd1, cond) for cond in (shut, shut, shut, asked, asked, shut, shut)]
    spy.handle.remove()
    assert spy.seen == [1, 0, 0, 1, 1, 1, 0] and ours(sd1) == before
    with refused:  # in place between calls
        sd1.module(sd1.sites(CROSS_K)[0])(shut.states)
    for tally in attachment.receipt.tallies:
        assert (tally.open, tally.shut) == (4, 10)
    attachment.remove()
    assert all(drawn[n].equal(call(sd1, shut)) for n in (0, 1, 2, 5, 6))
    assert drawn[3].equal(drawn[4]) and not drawn[3].equal(call(sd1, asked))


def test_where_gates_look_all_others_rest_until_one_opens(sd1: Base) -> None:
    """It opens at 100, on what a call shows that rests; that call is made anew with every hook."""
    looks = some.tokens(sd1, gates=[some.always(sd1, (1.0, -1.0), (100.0, 900.0))])
    text = sd1.encode(some.OTHER[:2])
    with_gate, free = Attachment(sd1.unet, [looks]), replace(looks, gates=())
    before, middle = ours(sd1), []
    spy = Spy(sd1)
    watch = sd1.module(some.MIDDLE).register_forward_pre_hook(lambda *_: middle.append(len(sd1.module(some.MIDDLE)._forward_hooks)))
    drawn = [call(sd1, text, t) for t in (900, 900, 800, 100, 100)]
    spy.handle.remove(), watch.remove()
    # the fourth call is seen twice: resting, and made anew
    assert spy.seen == [1, 0, 0, 0, 1, 1] and middle == [1] * 6 and ours(sd1) == before
    assert [t.open for t in with_gate.receipt.tallies] == [4] and with_gate.receipt.calls == 5
    with_gate.remove()
    plain = [call(sd1, text, t) for t in (900, 900, 800)]
    assert all(one.equal(other) for one, other in zip(drawn, plain, strict=False))
    ungated = Attachment(sd1.unet, [free])
    assert all(one.equal(call(sd1, text, 100)) for one in drawn[3:])
    ungated.remove()


def test_what_gates_look_at_is_missed_while_others_rest(sd1: Base) -> None:
    looks = some.tokens(sd1, gates=[some.always(sd1, (-1.0,))])
    text, attachment = sd1.encode(some.OTHER[:2]), Attachment(sd1.unet, [looks])
    call(sd1, text), call(sd1, text)
    middle = sd1.module(some.MIDDLE)
    middle._forward_pre_hooks.clear(), middle._forward_hooks.clear()
    with pytest.raises(SilentEditError, match="mid_block"):
        call(sd1, text)
    attachment.remove()


def test_what_is_lost_meanwhile_is_found_when_it_is_needed(sd1: Base, attachment: Attachment) -> None:
    shut, asked = sd1.encode(some.OTHER[:2]), sd1.encode(some.ASKED[:2])
    call(sd1, shut), call(sd1, shut)
    attachment._handles[-1].remove()
    with pytest.raises(SilentEditError):
        call(sd1, asked)


def test_hooks_of_others_keep_their_places(sd1: Base) -> None:
    cross, order = sd1.module(sd1.sites(CROSS)[0]), []
    hooks = [cross.register_forward_pre_hook(lambda *_: order.append("before"))]
    attachment = Attachment(sd1.unet, some.eraser(sd1))
    hooks.append(cross.register_forward_pre_hook(lambda *_: order.append("behind")))
    shut, keys = sd1.encode(some.OTHER[:2]), list(cross._forward_pre_hooks)
    for _ in range(3):
        call(sd1, shut)
        assert list(cross._forward_pre_hooks) == keys
    attachment.remove()
    for hook in hooks:
        hook.remove()
    assert order == ["before", "behind"] * 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_call_leaves_them_in_place(sd1: Base, attachment: Attachment, error: type) -> None:
    shut, before = sd1.encode(some.OTHER[:2]), ours(sd1)
    call(sd1, shut)

    def fail(*_: object) -> None:
        raise error

    handle = sd1.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(error):
        call(sd1, shut)
    handle.remove()
    asked = sd1.encode(some.ASKED[:2])
    with_them = call(sd1, asked)
    assert ours(sd1) == before
    attachment.remove()
    assert not with_them.equal(call(sd1, asked))


def test_a_copy_rests_on_its_own(sd1: Base, attachment: Attachment) -> None:
    shut, asked = sd1.encode(some.OTHER[:2]), sd1.encode(some.ASKED[:2])
    call(sd1, shut), call(sd1, shut)
    other = copy.copy(sd1)
    object.__setattr__(other, "unet", copy.deepcopy(sd1.unet))
    for _ in range(2):
        assert call(other, shut).equal(call(sd1, shut))
    assert call(other, asked).equal(call(sd1, asked))
    assert attachment.receipt.calls == 5


def test_not_where_a_graph_would_be_kept(sd1: Base, attachment: Attachment) -> None:
    """A block that is compiled after attaching is compiled with the hooks that are in it."""
    shut, spy = sd1.encode(some.OTHER[:2]), Spy(sd1)
    block = sd1.unet.get_submodule(sd1.sites(CROSS)[0].removeprefix("unet.").rpartition(".")[0])
    block._compiled_call_impl = nn.Module._call_impl.__get__(block)
    call(sd1, shut), call(sd1, shut)
    block._compiled_call_impl = None
    call(sd1, shut)
    spy.handle.remove()
    assert spy.seen == [1, 1, 0]


def test_not_under_gradients(sd1: Base, attachment: Attachment) -> None:
    shut, spy = sd1.encode(some.OTHER[:2]), Spy(sd1)
    for _ in range(2):
        sd1.unet(sd1.noise([0, 1]), some.TIME, encoder_hidden_states=shut.states)
    spy.handle.remove()
    assert spy.seen == [1, 1]
