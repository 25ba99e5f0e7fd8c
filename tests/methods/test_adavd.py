"""AdaVD: the file holds the concept's text states, and its values lose what is theirs."""

from __future__ import annotations

import torch
from small import TASK, edits

from conceptzap.base import CROSS_V, Base
from conceptzap.runtime.attach import attached
from conceptzap.task import Task


def values(base: Base, made: list, prompt: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    handles = []
    with torch.no_grad(), attached(base.unet, made):
        for site in base.sites(CROSS_V):
            keep = lambda m, a, out, site=site: found.__setitem__(site, out)  # noqa: E731
            handles.append(base.module(site).register_forward_hook(keep))
        base.eps(base.noise([0]), 500, base.encode([prompt]))
    for handle in handles:
        handle.remove()
    return found


def test_one_edit_of_all_values_holds_the_states_of_the_names(sd1: Base) -> None:
    (made,) = edits(sd1, "adavd")
    assert made.sites == sd1.sites(CROSS_V)
    assert made.tensors["prompt"][0].equal(sd1.encode(list(TASK.concepts)).states[0])
    assert made.params == {"phi": "project", "slope": 100.0, "shift": 0.93, "height": 2.0}


def test_the_concepts_own_values_are_turned_over(sd1: Base) -> None:
    """cos = 1, so that w = 2 / (1 + exp(-7)): v - w v is all but -v, at every position but the first."""
    made = edits(sd1, "adavd", Task(("cat",), ("dog",), ()))
    if len(made[0].tensors["prompt"]) > 1:  # one direction, without synonyms
        made[0].tensors["prompt"] = made[0].tensors["prompt"][:1]
    w = 2 / (1 + torch.exp(torch.tensor(-7.0)))
    before, after = values(sd1, [], "cat"), values(sd1, made, "cat")
    for site, v in before.items():
        assert after[site][:, 0].equal(v[:, 0])
        assert torch.allclose(after[site][:, 1:], (1 - w) * v[:, 1:], atol=1e-4)
