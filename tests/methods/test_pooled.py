"""SDXL's pooled text: closed forms move it by their own rule, as they do the states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import subspace
from conceptzap.training.closed_form import POOLED_SITE
from conceptzap.training.lessons import lessons

TASK = Task(("church",), ("house",), ("horse", "cat"), ("object",))
# what lets a method move what a random base says of a concept: little is kept
LIGHT: dict[str, dict[str, Any]] = {
    "rece": {"rank": 32, "ridge": 1e-3, "keep_scale": 0.1},
    "dp": {"rank": 32, "threshold": 1.0},
    "speed": {"rank": 32, "threshold": 1.0},
    "mace": {"refined": 32, "ridge": 1e-3, "keep_scale": 0.1, "steps": 1},
    "oce": {},  # turns away, to nowhere in particular
}


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_the_pooled_text_is_moved_too(name: str, sdxl: Base) -> None:
    """What the layer that reads it makes of a concept's text comes nearer to what it makes of the anchor's."""
    made = edits(sdxl, name, TASK, **LIGHT[name])
    (mine,) = [edit for edit in made if edit.sites == (POOLED_SITE,)]
    layer, width = sdxl.module(POOLED_SITE), sdxl.encode([""]).pooled.shape[1]
    assert not mine.tensors["down"][:, width:].any()  # time embeddings are not read
    concept, anchor, kept = (
        torch.nn.functional.pad(sdxl.encode([text]).pooled, (0, layer.weight.shape[1] - width))
        for text in ("a church", "a house", "a photo of a horse")
    )
    with attached(sdxl, made), torch.no_grad():
        sdxl.eps(sdxl.noise([0]), 500, sdxl.encode([""]))
    delta = change(sdxl, mine)
    moved = (layer.weight + delta) @ concept.T - layer.weight @ anchor.T
    whole = layer.weight @ (concept - anchor).T
    assert moved.norm() < 0.9 * whole.norm() or not LIGHT[name]
    assert (delta @ kept.T).norm() < (delta @ concept.T).norm()


def change(base: Base, edit: Any) -> torch.Tensor:
    from conceptzap.runtime.ops import weight_delta

    return weight_delta([edit], base.module(POOLED_SITE))


def test_pooled_texts_are_whole_prompts(sdxl: Base, sd1: Base) -> None:
    taught = list(lessons(sdxl, TASK))
    told = subspace.states_of(sdxl, taught, 12)
    pooled = subspace.pooled_of(sdxl, taught, 12)
    assert told.pooled is not None and pooled.source.equal(told.pooled.source)
    prompts = taught[0].prompts
    assert len(pooled.source) == len(pooled.target) == len(prompts)
    assert torch.allclose(pooled.source.float(), sdxl.encode(prompts).pooled, atol=1e-5)
    assert subspace.pooled_of(sd1, list(lessons(sd1, TASK)), 12) is None
