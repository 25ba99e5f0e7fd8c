"""CASteer: the vectors are differences of means, and an output that leans to one is reflected."""

from __future__ import annotations

import pytest
import torch
from small import edits

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.methods import casteer
from conceptzap.runtime.attach import attached
from conceptzap.training import activations


def outputs(base: Base, site: str, made: list, t: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with torch.no_grad(), attached(base.unet, made):
        handle = base.module(site).register_forward_hook(lambda m, a, out: seen.append(out))
        base.eps(base.noise([0]), t, base.encode(["a cat"]))
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_what_leans_to_the_vector_is_turned_by_hand(sd1: Base, beta: float) -> None:
    """y - beta max(<s, y>, 0) s with the vector of the nearest time; beta = 2 keeps every norm."""
    site = sd1.sites("unet.*.attn2")[0]
    mean = outputs(sd1, site, [], 500).mean((0, 1))
    toward = torch.stack([mean + 0.1 * torch.randn(len(mean), generator=torch.Generator().manual_seed(1)), -mean])
    made = [casteer.reflection(site, toward, torch.tensor([900, 100]), beta)]
    y, s = outputs(sd1, site, [], 880), toward[0] / toward[0].norm()
    turned = outputs(sd1, site, made, 880)
    assert torch.allclose(turned, y - beta * (y @ s).clamp(min=0)[..., None] * s, atol=1e-6)
    assert (turned @ s).max() < 1e-5 < (y @ s).min()
    if beta == 2:
        assert torch.allclose(turned.norm(dim=-1), y.norm(dim=-1), atol=1e-5)
    away = outputs(sd1, site, [], 300)
    assert (away @ toward[1]).max() < 0 and torch.equal(outputs(sd1, site, made, 300), away)


def test_vectors_are_differences_of_means_by_timestep(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    read, along = [], activations.along
    monkeypatch.setattr(activations, "along", lambda *given: read.append(list(along(*given))) or read[-1])
    made = edits(sd1, "casteer")
    assert made and {edit.sites[0] for edit in made} <= set(sd1.sites("unet.*.attn2"))
    for edit in made:
        (site,) = edit.sites
        means = [torch.stack([step[site].mean((0, 1)) for step in steps]) for steps in read]
        wanted = torch.nn.functional.normalize(means[0] - means[1], dim=1)
        assert torch.allclose(edit.tensors["down"], wanted)
        assert torch.allclose(edit.tensors["up"], -2 * wanted.T)
        assert len(edit.tensors["times"]) == 3


def test_sites_that_are_not_there_are_said(sd1: Base) -> None:
    with pytest.raises(UsageError, match="no module of this base matches"):
        edits(sd1, "casteer", sites="unet.*.attn9")
