"""ConceptPrune: Wanda's scores, and that a pruned input is a zeroed one."""

from __future__ import annotations

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.methods import prune
from conceptzap.runtime import ops
from conceptzap.runtime.attach import attached


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
    with torch.no_grad(), attached(sd1.unet, [prune.mask_of(site, mask)]):
        handles.append(module.register_forward_hook(lambda m, a, out: seen.setdefault("y", out)))
        sd1.eps(sd1.noise([0]), 500, sd1.encode(["a cat"]))
    for handle in handles:
        handle.remove()
    x = seen["x"].masked_fill(mask, 0)
    with torch.no_grad():
        assert torch.equal(seen["y"], module(x))


def test_scores_are_wandas(sd1: Base) -> None:
    """|W_ij| ||A_j|| of single weights, sqrt(sum_i (|W_ij| ||A_j||)^2) of their columns."""
    (site, *_) = sd1.sites("unet.*.ff.net.2")
    inputs: list[torch.Tensor] = []
    handle = sd1.module(site).register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad(), prune.squares(sd1, "unet.*.ff.net.2") as energy:
        sd1.eps(sd1.noise([0, 1]), 500, sd1.encode(["a cat", "a dog"]))
    handle.remove()
    norm = inputs[0].flatten(0, -2).norm(dim=0)
    assert torch.allclose(energy[site].sqrt(), norm, rtol=1e-4)
    weight = sd1.module(site).weight.detach()
    single = prune.scores(weight, norm, whole=False)
    assert torch.allclose(single, weight.abs() * norm)
    assert torch.allclose(single.norm(dim=0), prune.scores(weight, norm, whole=True), rtol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_masks_cut_no_more_than_their_share(sd1: Base, whole: bool) -> None:
    """Of the inputs, or of every row's weights."""
    for edit in edits(sd1, "prune", share=0.05, trajectories=2, window=0.1, whole=whole):
        weight = sd1.module(edit.sites[0]).weight
        most = max(1, round(0.05 * weight.shape[1]))
        if whole:
            assert edit.tensors["keep"].shape == weight.shape[1:] and 1 <= (~edit.tensors["keep"]).sum() <= most
        else:
            keep = ops.unpack(edit.tensors["bits"], weight.shape)
            assert 0 < (~keep).sum() and (~keep).sum(1).max() <= most
            assert edit.tensors["bits"].numel() == len(weight) * -(-weight.shape[1] // 8)
    with pytest.raises(UsageError, match="no neuron"):
        edits(sd1, "prune", margin=1000.0)
