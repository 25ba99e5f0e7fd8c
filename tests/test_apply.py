"""Erasures on somebody's own diffusers pipeline, tested through `pipe(...)` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import edits

import conceptzap
from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure, Header
from conceptzap.errors import FormatError, MismatchError, UsageError
from conceptzap.runtime.gates import Signal, factor
from conceptzap.testing import tiny
from conceptzap.trust import canary

PROMPTS = ["a cat", "a red car", "a photo of a cat", "a castle by monet"]


def erasure(base: Base, concept: str, made: list[Edit]) -> Erasure:
    sites = [site for edit in made for site in edit.sites]
    header = Header(
        concept,
        (concept,),
        ("dog",),
        base.reference(sites),
        canary=canary.make(base, made, concept),
    )
    return format.seal(Erasure(header, tuple(made)))


def weight(base: Base, concept: str, seed: int) -> Erasure:
    """A small ungated edit of every key and value."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        slot: 0.3 * torch.randn(*shape, generator=generator)
        for slot, shape in (("into", (32, 2)), ("down", (2, 32)))
    }
    return erasure(base, concept, [Edit("weight", base.sites("unet.*.attn2.to_[kv]"), tensors)])


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny("sd1")


@pytest.fixture(scope="module")
def pipe(base: Base) -> Any:
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def gated(base: Base) -> Erasure:
    return erasure(base, "cat", edits(base, "zap", steps=1))


@pytest.fixture(scope="module")
def two(base: Base) -> tuple[Erasure, Erasure]:
    return weight(base, "cat", 1), weight(base, "house", 2)


def draw(pipe: Any, prompts: list[str], seed: int = 0, **more: Any) -> np.ndarray:
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", **more}
    return pipe(prompts, generator=seeds, **settings).images


def test_every_row_of_a_mixed_batch_is_what_it_is_alone(
    base: Base, pipe: Any, gated: Erasure
) -> None:
    plain = draw(pipe, PROMPTS)
    states = base.encode(PROMPTS).states
    opened = factor(gated.edits[0], Signal(states, torch.zeros(4))).bool().tolist()
    assert any(opened) and not all(opened), "the batch has to be mixed"
    handle = conceptzap.apply(pipe, gated)
    try:
        together = draw(pipe, PROMPTS)
        for row, prompt in enumerate(PROMPTS):
            alone = draw(pipe, [prompt], seed=row)[0]
            assert np.allclose(together[row], alone, atol=2e-3), prompt
            assert np.allclose(alone, plain[row], atol=1e-6) is not opened[row], prompt
    finally:
        handle.remove()
    assert np.array_equal(draw(pipe, PROMPTS), plain)


def test_a_batch_that_no_gate_opens_for_is_untouched(base: Base, pipe: Any, gated: Erasure) -> None:
    states = base.encode(PROMPTS).states
    shut = [
        prompt
        for prompt, open_ in zip(
            PROMPTS, factor(gated.edits[0], Signal(states, torch.zeros(4))), strict=True
        )
        if not open_
    ]
    plain = draw(pipe, shut)
    handle = conceptzap.apply(pipe, gated)
    try:
        assert np.array_equal(draw(pipe, shut), plain)
        assert handle.receipt and not any(tally.fired for tally in handle.receipt.tallies)
    finally:
        handle.remove()


def test_two_stack_in_any_order_and_come_off_one_by_one(pipe: Any, two: Any) -> None:
    plain = draw(pipe, ["a cat"])
    first = conceptzap.apply(pipe, two[0])
    only = draw(pipe, ["a cat"])
    second = conceptzap.apply(pipe, two[1])
    both = draw(pipe, ["a cat"])
    second.remove()
    assert np.array_equal(draw(pipe, ["a cat"]), only)
    first.remove()
    first.remove()
    assert np.array_equal(draw(pipe, ["a cat"]), plain) and first.receipt is None
    for order in (list(two), list(reversed(two)), [conceptzap.stack(two)]):
        handle = conceptzap.apply(pipe, order)
        assert np.array_equal(draw(pipe, ["a cat"]), both)
        handle.remove()
    assert not np.array_equal(only, plain) and not np.array_equal(both, only)


def test_the_same_one_twice_counts_once(pipe: Any, two: Any) -> None:
    once = conceptzap.apply(pipe, two[0])
    seen = draw(pipe, ["a cat"])
    again = conceptzap.apply(pipe, [two[0], two[0]])
    assert np.array_equal(draw(pipe, ["a cat"]), seen)
    again.remove()
    assert np.array_equal(draw(pipe, ["a cat"]), seen)
    once.remove()


def test_strength(pipe: Any, two: Any) -> None:
    plain, pictures = draw(pipe, ["a cat"]), {}
    for strength in (0, 0.5, 1, 2):
        handle = conceptzap.apply(pipe, two[0], strength)
        pictures[strength] = draw(pipe, ["a cat"])
        handle.remove()
    assert np.array_equal(pictures[0], plain)
    changes = [np.abs(pictures[s] - plain).mean() for s in (0, 0.5, 1, 2)]
    assert changes == sorted(changes) and changes[1] > 0
    for bad in (-1, 2.5, float("nan")):
        with pytest.raises(UsageError, match="out of range"):
            conceptzap.apply(pipe, two[0], bad)


def test_files_of_any_number(pipe: Any, two: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.lprompt.safetensors" for name in "ab"]
    for path, one in zip(paths, two, strict=True):
        conceptzap.save(one, path)
    plain = draw(pipe, ["a cat"])
    handle = conceptzap.apply(pipe, [str(paths[0]), paths[1]])
    assert not np.array_equal(draw(pipe, ["a cat"]), plain)
    handle.remove()
    with pytest.raises(FormatError):
        conceptzap.apply(pipe, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no erasure"):
        conceptzap.apply(pipe, [])
    assert np.array_equal(draw(pipe, ["a cat"]), plain)


def test_another_architecture_is_refused_and_what_was_on_stays(pipe: Any, two: Any) -> None:
    foreign = weight(tiny("sd1"), "cat", 5)
    other = tiny("sd2").pipeline()
    with pytest.raises(MismatchError, match="another architecture") as error:
        conceptzap.apply(other, foreign)
    assert error.value.exit_code == 4
    handle = conceptzap.apply(pipe, two[0])
    seen = draw(pipe, ["a cat"])
    sd2 = tiny("sd2")
    tensors = {"into": torch.ones(40, 1), "down": torch.ones(1, 40)}
    wrong = erasure(sd2, "cat", [Edit("weight", sd2.sites("unet.*.attn2.to_k"), tensors)])
    with pytest.raises(MismatchError):
        conceptzap.apply(pipe, wrong)
    assert np.array_equal(draw(pipe, ["a cat"]), seen)
    handle.remove()


def test_another_checkpoint_is_warned_of_or_refused(two: Any) -> None:
    tuned = tiny("sd1", seed=1).pipeline()
    tuned.set_progress_bar_config(disable=True)
    plain = draw(tuned, ["a cat"])
    with pytest.raises(MismatchError, match="another checkpoint"):
        conceptzap.apply(tuned, two[0], strict=True)
    with pytest.warns(UserWarning, match="another checkpoint"):
        handle = conceptzap.apply(tuned, two[0])
    assert not np.array_equal(draw(tuned, ["a cat"]), plain)
    handle.remove()
