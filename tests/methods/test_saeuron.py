"""SAeUron: which features are chosen, and that their ablation is the published one, by hand."""

from __future__ import annotations

import pytest
import torch
from small import edits, settings

from conceptzap.base import Base
from conceptzap.methods import saeuron
from conceptzap.registry import config
from conceptzap.runtime.attach import attached
from conceptzap.training import activations
from conceptzap.training.dictionary import Dictionary

SITE = "unet.up_blocks.1.attentions.0"


pytestmark = pytest.mark.usefixtures("own_cache")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_shares_of_all_activation() -> None:
    means, others = torch.tensor([[1.0, 3, 0]]), torch.tensor([[2.0, 2, 4]])
    assert torch.allclose(saeuron.scores(means, others), torch.tensor([[0.0, 0.5, -0.5]]))


def test_chosen_features_are_scaled_and_the_rest_is_left(sd1: Base) -> None:
    """Encode, scale gamma mu where a chosen feature exceeds its mean elsewhere, decode, add the error back."""
    cfg = config.resolve(saeuron.Config, settings("saeuron", features=2, multiplier=1.5))
    words = Dictionary(randn(32, 16), randn(32, seed=1), randn(32, 16, seed=2), randn(16, seed=3), 0.2)
    means, others = randn(2, 32, seed=4).abs(), randn(2, 32, seed=5).abs()
    made = saeuron.against(SITE, words, means, others, torch.tensor([900, 100]), cfg)
    asked = sd1.noise([0]), 880, sd1.encode(["a cat"])
    with torch.no_grad(), attached(sd1.unet, [made]), activations.outputs(sd1, [SITE]) as found:
        sd1.eps(*asked)
        edited = found[SITE]
    with torch.no_grad(), activations.outputs(sd1, [SITE]) as found:
        sd1.eps(*asked)
        x = found[SITE]
    h = words.features(x)
    best = saeuron.scores(means, others)[0].topk(2).indices
    scaled = h.clone()
    for i in best:
        scaled[..., i] = torch.where(h[..., i] > others[0, i], -1.5 * means[0, i] * h[..., i], h[..., i])
    error = x - words.rebuild(h)
    assert torch.allclose(edited, words.rebuild(scaled) + error, atol=1e-4)
    assert not torch.allclose(edited, x, atol=1e-3)


def test_what_fires_somewhat_more_for_the_concept_is_chosen_unless_a_ratio_forbids_it() -> None:
    """A thing and its anchor share most features: what tells them apart is in all of both."""
    words = Dictionary(randn(8, 16), randn(8, seed=1), randn(8, 16, seed=2), randn(16, seed=3), 0.0)
    means, others = torch.full((1, 8), 1.0), torch.full((1, 8), 1.0)
    means[0, 5] = 1.5
    for wanted, chosen in (({}, True), ({"ratio": 2.0}, False)):
        cfg = saeuron.Config(features=1, **wanted)
        made = saeuron.against(SITE, words, means, others, torch.tensor([500]), cfg)
        assert bool((made.tensors["gain"] != 0).all()) is chosen
        assert made.tensors["down"].equal(words.encoder[5:6]) or not chosen


def test_its_gate_is_left_out_where_it_is_asked_for_as_published(sd1: Base) -> None:
    for gate, kinds in ((True, {"match"}), (False, set())):
        made = edits(sd1, "saeuron", features=2, gate=gate)
        assert made and {one.kind for edit in made for one in edit.gates} == kinds


def test_a_file_carries_rows_of_chosen_features_alone(sd1: Base) -> None:
    made = edits(sd1, "saeuron", features=2)
    assert made and {edit.sites[0] for edit in made} <= set(sd1.sites("unet.up_blocks.1.attentions.?"))
    for edit in made:
        rows, times = len(edit.tensors["down"]), len(edit.tensors["times"])
        assert rows <= 2 * times and edit.tensors["gain"].shape == (times, rows)
        assert ((edit.tensors["gain"] != 0).sum(1) <= 2).all()
