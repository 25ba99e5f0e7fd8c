"""ConceptPrune: Wanda's scores, and that a pruned input is a zeroed one."""

from __future__ import annotations

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.methods import prune
from conceptzap.runtime.attach import attached
from conceptzap.training import objectives


@pytest.fixture(autouse=True)
def short_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "DENOISING", 3)


def test_what_is_cut_is_high_with_the_concept_and_higher_than_without() -> None:
    concept, anchor = torch.tensor([5.0, 4, 3, 2]), torch.tensor([9.0, 1, 1, 1])
    assert prune.skilled(concept, anchor, 0.5, 1.0).tolist() == [False, True, False, False]
    assert prune.skilled(concept, anchor, 0.75, 3.5).tolist() == [False, True, False, False]


def test_a_pruned_input_is_a_zeroed_one(sd1: Base) -> None:
    """The layer under the edit equals the layer on an input with those entries set to 0, exactly."""
    (site, *_) = sd1.sites("unet.*.ff.net.2")
    module, seen = sd1.module(site), {}
    mask = torch.zeros(module.weight.shape[1], dtype=torch.bool)
    mask[[1, 4, 5]] = True
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0])),
    ]
    with torch.no_grad(), attached(sd1.unet, [prune.one_hot(site, mask)]):
        handles.append(module.register_forward_hook(lambda m, a, out: seen.setdefault("y", out)))
        sd1.eps(sd1.noise([0]), 500, sd1.encode(["a cat"]))
    for handle in handles:
        handle.remove()
    x = seen["x"].masked_fill(mask, 0)
    with torch.no_grad():
        assert torch.equal(seen["y"], module(x))


def test_scores_are_wandas_by_column(sd1: Base) -> None:
    """sqrt(sum_i (|W_ij| |A_j|)^2) over the rows i of single scores."""
    (site, *_) = sd1.sites("unet.*.ff.net.2")
    inputs: list[torch.Tensor] = []
    handle = sd1.module(site).register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad(), prune.squares(sd1, "unet.*.ff.net.2") as energy:
        sd1.eps(sd1.noise([0, 1]), 500, sd1.encode(["a cat", "a dog"]))
    handle.remove()
    norm = inputs[0].flatten(0, -2).norm(dim=0)
    assert torch.allclose(energy[site].sqrt(), norm, rtol=1e-4)
    weight = sd1.module(site).weight
    single = weight.abs() * norm
    assert torch.allclose(single.norm(dim=0), weight.norm(dim=0) * energy[site].sqrt(), rtol=1e-4)


def test_masks_are_one_hot_and_no_more_than_their_share(sd1: Base) -> None:
    for edit in edits(sd1, "prune", share=0.05, trajectories=2, window=0.1):
        (site,), down = edit.sites, edit.tensors["down"]
        assert torch.equal(edit.tensors["into"], -down.T)
        assert torch.equal(down @ down.T, torch.eye(len(down)))
        assert len(down) <= max(1, round(0.05 * sd1.module(site).weight.shape[1]))
    with pytest.raises(UsageError, match="no neuron"):
        edits(sd1, "prune", margin=1000.0)
