"""AdvUnlearn: the text encoder is trained, against one free token in front of the prompt."""

from __future__ import annotations

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.methods import advunlearn
from conceptzap.runtime.attach import attached


def test_every_edit_is_in_a_text_encoder_and_has_learned(base: Base) -> None:
    """But for what nobody reads: SDXL's first encoder is read before its last layer."""
    made = edits(base, "advunlearn", steps=2, warmup=1)
    sites = {site for edit in made for site in edit.sites}
    linear = {s for s in base.sites("text.*.layers.*") if isinstance(base.module(s), torch.nn.Linear)}
    unread = {s for s in linear if s.startswith("text.1.encoder.layers.1.")} if base.family == "sdxl" else set()
    assert sites == linear - unread
    with attached(base, made):
        changed = base.encode(["a cat"])
    assert not changed.states.equal(base.encode(["a cat"]).states)


def test_the_token_stands_in_front_of_the_prompt_and_has_a_gradient(base: Base) -> None:
    token = advunlearn.prefix(base, 0)
    assert [one.shape for one in token] == [
        (1, encoder.get_input_embeddings().weight.shape[1]) for encoder in base.text_encoders
    ]
    found = advunlearn.read(base, ["a cat", "a dog"], token)
    assert torch.equal(found.states[:, 0], base.encode(["a cat", "a dog"]).states[:, 0])
    assert not torch.allclose(found.states[:, 1], base.encode(["a cat", "a dog"]).states[:, 1])
    found.states.sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in token)


def test_the_attack_begins_after_the_warm_up(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = advunlearn._student
    monkeypatch.setattr(
        advunlearn, "_student", lambda *given, **rest: (seen.append(given[4]), plain(*given, **rest))[1]
    )
    edits(sd1, "advunlearn", steps=4, warmup=2)
    assert seen == ["erase", "retain"] * 2 + ["attack"] + ["erase", "attacked", "retain"]
