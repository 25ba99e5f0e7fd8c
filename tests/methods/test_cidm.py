"""CIDM: a change orthogonal to those in force, let in by nearness to the power 4."""

from __future__ import annotations

import torch
from edits import delta, low_rank, shared
from small import edits

from conceptzap.base import Base
from conceptzap.methods import cidm
from conceptzap.runtime.attach import installed
from conceptzap.task import Task
from conceptzap.training import subspace

KEYS = "unet.*.attn2.to_k"


def shares(base: Base, made: list, before: list) -> float:
    """The largest share of an edit's strength that lies along directions that were taken."""
    found = []
    for edit in made:
        old, up = subspace.outputs(base, before, edit.sites[0]), edit.tensors["up"].double()
        found.append(((old.T @ up).norm() / up.norm()).item())
    return max(found)


def test_outputs_are_those_of_low_rank_changes_alone(base: Base) -> None:
    (site, *_) = base.sites(KEYS)
    pair, dense = shared(base, r=2), delta(base, KEYS)
    basis = subspace.outputs(base, [pair, dense], site)
    weight = base.module(site).weight.detach().double()
    change = weight @ pair.tensors["into"].double() @ pair.tensors["down"].double()
    assert basis.shape == (len(weight), 2) and torch.allclose(basis.T @ basis, torch.eye(2).double())
    assert torch.allclose(basis @ basis.T @ change, change, atol=1e-8)
    assert subspace.outputs(base, [dense], site).shape == (len(weight), 0)
    many = [shared(base, r=4, seed=n) for n in range(40)]
    assert subspace.outputs(base, many, site).shape[1] == len(weight) // 2


def test_a_new_change_is_orthogonal_to_those_in_force(sd1: Base) -> None:
    before = [shared(sd1, r=2)]
    free = edits(sd1, "cidm")
    with installed(sd1.unet, before):
        made = edits(sd1, "cidm")
    assert shares(sd1, made, before) < 1e-6 < 0.05 < shares(sd1, free, before)
    assert all(edit.tensors["up"].any() for edit in made)


def test_so_are_several_concepts_of_one_call(sd1: Base) -> None:
    made = edits(sd1, "cidm", Task(("cat", "church"), ("dog", "house"), ("horse",)))
    first, second = (made[: len(made) // 2], made[len(made) // 2 :])
    assert shares(sd1, second, first) < 1e-6
    (one,), (other,) = ({edit.gates for edit in part} for part in (first, second))
    assert one != other and one[0].kind == other[0].kind == "similar" and one[0].params["power"] == 4


def test_overlap_is_the_mean_of_what_new_directions_share_with_old_ones(sd1: Base) -> None:
    (edit,) = [low_rank(sd1, sd1.sites(KEYS)[0])]
    up = edit.tensors["up"].double()
    basis, _ = torch.linalg.qr(up)
    taken = {edit.sites[0]: basis}
    assert torch.allclose(cidm.overlap([edit], taken).double(), (basis.T @ up).abs().mean(), rtol=1e-5)
    left = cidm.apart(edit, taken).tensors["up"]
    assert left.abs().max() < 1e-5 * up.abs().max()
