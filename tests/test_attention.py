"""Attention maps: what the UNet attends with, edits and strengths included."""

from __future__ import annotations

from typing import Any

import edits as some
import pytest
import torch
from erasures import nudge

from conceptzap.base import CROSS, Base
from conceptzap.edit import Edit
from conceptzap.result import Settings
from conceptzap.runtime import attention
from conceptzap.runtime.attach import attached

PROMPT = "a photo of a cat"


def learned(base: Base, scale: float = 1.0) -> Edit:
    """Three learned tokens at every cross-attention."""
    width = base.module(base.sites(CROSS)[0]).to_k.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(3, width, generator=generator) for name in ("prompt_k", "prompt_v")}
    return Edit("tokens", base.sites(CROSS), rows, scale=scale)


def look(base: Base, prompt: str, word: str, settings: Settings, *edits: Edit) -> attention.Maps:
    (found,) = attention.look(base, [prompt], [[word]], [0], settings, edits)
    return found


def test_pictures_that_are_drawn_together_are_looked_at_as_if_alone(sd1: Base) -> None:
    """Also where a gate is open for one of them and shut for the other."""
    edits, prompts = some.eraser(sd1), [some.ASKED[1], some.OTHER[1]]
    settings = Settings(steps=2, guidance=2.0)
    asked = prompts, [["van gogh"], ["cat"]]
    together = attention.look(sd1, *asked, [3, 4], settings, edits)
    for row, (found, parts) in enumerate(zip(together, ({"concept", "learned"}, {"concept"}), strict=True)):
        prompt, words = (one[row] for one in asked)
        (alone,) = attention.look(sd1, [prompt], [words], [3 + row], settings, edits)
        assert set(found.maps) == set(alone.maps) == parts
        for part in parts:
            torch.testing.assert_close(found.maps[part], alone.maps[part])


def test_attention_of_words_and_learned_tokens_adds_up(sd1: Base) -> None:
    settings = Settings(steps=3)
    bare = look(sd1, PROMPT, "cat", settings)
    erased = look(sd1, PROMPT, "cat", settings, learned(sd1))
    assert set(bare.maps) == {"concept"} and set(erased.maps) == {"concept", "learned"}
    assert bare.maps["concept"].shape == (attention.SIDE, attention.SIDE)
    assert 0 < erased.shares["learned"] < 1
    assert look(sd1, "cat", "cat", settings).shares["concept"] < 1


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
def test_attention_is_the_modules_own(base: Base, strength: float) -> None:
    """Weights times values must be what the module itself hands to its output layer."""
    seen: dict[str, list[torch.Tensor]] = {"values": [], "mixed": []}

    def keep(name: str) -> Any:
        return lambda _, given, made=None: seen[name].append(given[0] if made is None else made)

    modules = [base.module(site) for site in base.sites(CROSS)]
    with attached(base.unet, [learned(base, strength)]), attention.captured(base) as taken:
        handles = [one.to_v.register_forward_hook(keep("values")) for one in modules]
        handles += [one.to_out[0].register_forward_pre_hook(keep("mixed")) for one in modules]
        with torch.no_grad():
            base.eps(base.noise([0, 1]), 500, base.encode([PROMPT, "a dog"]))
        for handle in handles:
            handle.remove()
    assert len(taken) == len(modules) and (taken[0].bias is None) == (strength == 1)
    for call, values, mixed in zip(taken, seen["values"], seen["mixed"], strict=True):
        for row in range(2):
            split = values[row].unflatten(-1, (call.heads, -1)).transpose(0, 1)
            made = (attention.heads(call, row) @ split).transpose(0, 1).flatten(1)
            torch.testing.assert_close(made, mixed[row])


def test_a_weaker_edit_is_attended_to_less(sd1: Base) -> None:
    def share(scale: float) -> float:
        return look(sd1, PROMPT, "cat", Settings(steps=1), learned(sd1, scale)).shares["learned"]

    shares = [share(scale) for scale in (0.01, 0.5, 1.0)]
    assert shares[0] < 0.02 and shares[0] < shares[1] < shares[2]


def test_attention_without_learned_tokens_is_of_words_alone(sd1: Base) -> None:
    seen = look(sd1, "a dog", "church", Settings(steps=2), *nudge(sd1, "cat").edits)
    assert seen.maps == {} and seen.shares == {}


def test_a_words_tokens_are_found_wherever_they_stand(sd1: Base) -> None:
    ids = sd1.tokenizers[0](PROMPT).input_ids
    assert attention.positions(sd1, PROMPT, ["cat"]) == [len(ids) - 2]
    assert attention.positions(sd1, "a cat and a cat", ["cat"])[0] == 2
