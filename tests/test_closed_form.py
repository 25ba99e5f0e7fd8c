"""The closed form against the dense ridge problem it stands for, and which state becomes which."""

from __future__ import annotations

import pytest
import torch

from conceptzap.base import CROSS_KV, Base
from conceptzap.testing import tiny
from conceptzap.training import closed_form, solving
from conceptzap.training.closed_form import Moves
from conceptzap.training.states import States
from conceptzap.training.wordings import Pair

START, END = 100, 101
KEEP_SCALE, RIDGE = 2.0, 0.01


def problem(width: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, width, generator=generator) for n in (30, 30, 50))


def dense(c: torch.Tensor, wanted: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """M as the least squares solution of the stacked rows, one for each term of the objective."""
    c, wanted, p = c.double(), wanted.double(), p.double()
    eye = torch.eye(c.shape[1], dtype=c.dtype) * RIDGE**0.5
    weights = len(c) ** -0.5, (KEEP_SCALE / len(p)) ** 0.5
    rows = torch.cat([weights[0] * c, weights[1] * p, eye])
    targets = torch.cat([weights[0] * wanted, weights[1] * p, eye])
    return torch.linalg.lstsq(rows, targets).solution.T


def summed(c: torch.Tensor, wanted: torch.Tensor, p: torch.Tensor, parts: int = 1) -> Moves:
    """The sums, taken in pieces."""
    sums = Moves(c.shape[1])
    for one, other in zip(c.chunk(parts), wanted.chunk(parts), strict=True):
        sums.move(one, other)
    for kept in p.chunk(parts):
        sums.keep(kept)
    return sums


def solve(c: torch.Tensor, wanted: torch.Tensor, p: torch.Tensor, rank: int = 12) -> torch.Tensor:
    slots = closed_form.solve(
        summed(c, wanted, p), rank=rank, ridge=RIDGE, keep_scale=KEEP_SCALE
    )
    assert slots["into"].shape == slots["down"].T.shape and slots["into"].shape[1] <= rank
    return torch.eye(c.shape[1]) + slots["into"] @ slots["down"]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No direction is left out for being small."""
    monkeypatch.setattr(closed_form, "ENERGY", 1.0)


def test_at_full_rank_it_is_the_dense_ridge_solution(whole: None) -> None:
    c, wanted, p = problem()
    assert torch.allclose(solve(c, wanted, p).double(), dense(c, wanted, p), atol=1e-5)


def test_for_a_layer_it_is_uce_with_the_layers_own_targets(whole: None) -> None:
    """Eq. 7 with v* = W c*: sum(v* c^T + s W p p^T + l W)(sum c c^T + s p p^T + l I)^-1 = W M."""
    c, wanted, p = (one.double() for one in problem())
    w = torch.randn(5, 12, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    eye = torch.eye(12, dtype=torch.double)
    gram = c.T @ c / len(c) + KEEP_SCALE * p.T @ p / len(p) + RIDGE * eye
    right = w @ (wanted.T @ c / len(c) + KEEP_SCALE * p.T @ p / len(p) + RIDGE * eye)
    m = solve(*problem())
    assert torch.allclose(w @ m.double(), right @ torch.linalg.inv(gram), atol=1e-5)


def test_fewer_ranks_fit_the_states_worse_and_never_by_chance_better(whole: None) -> None:
    c, wanted, p = problem()
    full = dense(c, wanted, p).float()
    gaps = [(c @ (solve(c, wanted, p, rank) - full).T).norm().item() for rank in (1, 4, 8, 12)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-4 < gaps[-2]


def test_what_need_not_move_does_not() -> None:
    c, _, p = problem()
    assert torch.allclose(solve(c, c, p), torch.eye(12), atol=1e-5)


def test_the_rank_is_the_smallest_that_holds_the_change() -> None:
    generator = torch.Generator().manual_seed(3)
    c, p = (torch.randn(200, 40, generator=generator) for _ in range(2))
    direction = torch.randn(40, generator=generator)
    plain = c + 1e-4 * torch.randn(200, 40, generator=generator)
    slots = closed_form.solve(
        summed(c, plain + (c @ direction)[:, None] * direction, p), rank=12, ridge=0.01, keep_scale=1.0
    )
    assert slots["into"].shape == (40, 1)


@pytest.mark.parametrize("width", [160, 400])
def test_the_solution_is_the_dense_one_cut_to_its_rank(width: int) -> None:
    """Within 1e-6: best rank 8 of (M - I) in the metric of the states, by a full decomposition."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.double) / width**0.5
    scale = torch.logspace(0, -3, width, dtype=torch.double)
    c, p = ((torch.randn(900, width, generator=generator).double() @ mixing * scale) for _ in range(2))
    wanted = c @ (torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)).double()
    sums = summed(c, wanted, p, parts=3)
    ridge = 0.05 * sums.mean_square
    assert abs(sums.mean_square - c.square().mean().item()) < 1e-9
    slots = closed_form.solve(sums, rank=8, ridge=ridge, keep_scale=2.0)
    gram = c.T @ c / 900 + 2.0 * p.T @ p / 900 + ridge * torch.eye(width, dtype=torch.double)
    root = torch.linalg.cholesky(gram)
    change = (wanted - c).T @ c / 900 @ torch.linalg.inv(gram)
    u, s, vh = torch.linalg.svd(change @ root)
    best = u[:, :8] * s[:8] @ vh[:8] @ torch.linalg.inv(root)
    found = slots["into"].double() @ slots["down"].double()
    assert (found - best).norm() < 1e-6 * best.norm()


@pytest.mark.parametrize("width", [24, 101, 160])
def test_systems_solved_together_are_each_the_one_solved_alone(width: int) -> None:
    """Bit for bit, whatever company they are in: a list's files are those of its concepts alone."""
    generator = torch.Generator().manual_seed(width)
    systems = []
    for number in range(5):
        c, p, wanted = torch.randn(3, 200 + number, width, generator=generator)
        sums = Moves.of(c, wanted, p[: 100 * number])
        systems.append((sums, {"rank": 2 + number, "ridge": 0.1 * (1 + number), "keep_scale": 4.0}))
    alone = [closed_form.solve(sums, **rest) for sums, rest in systems]
    for order in ((0, 1, 2, 3, 4), (4, 3, 1)):
        some = [closed_form.solving(sums, **rest) for sums, rest in (systems[number] for number in order)]
        for number, pair in zip(order, solving.together(some), strict=True):
            assert all(torch.equal(pair[slot], alone[number][slot]) for slot in ("into", "down"))


def test_concepts_solved_together_have_the_edits_of_each_alone() -> None:
    base = tiny("sdxl")  # two encoders of different widths, and a pooled text
    asked: list[list[list[Moves]]] = []
    for name, anchor in (("cat", "dog"), ("house", "tree"), ("boat", "car")):
        sums = moves(base, [Pair(f"a {name}", f"a {anchor}")], [name], anchor, ["a horse", name])
        asked.append([sums])
    asked[1] += asked[2]

    def unsolved(parts: list[list[Moves]]) -> list[solving.Unsolved]:
        return [closed_form.unsolved(base, sums, rank=4, ridge=0.05, keep_scale=4.0) for sums in parts]

    together = solving.solved([unsolved(parts) for parts in asked])
    assert [len(edits) for edits in together] == [2, 4, 2]
    for parts, edits in zip(asked, together, strict=True):
        (alone,) = solving.solved([unsolved(parts)])
        assert [edit.name for edit in alone] == [edit.name for edit in edits]


@pytest.mark.parametrize(
    ("asked", "instead", "names", "anchor", "expected"),
    [
        # "a painting of t by C" -> "a painting of t": words both have become each other
        ([1, 2, 3, 7, 4], [1, 2, 3], [[7]], [], [-1, -1, -1, -1, 4, 4, 6, 7]),
        # "C of t" -> "A of t"
        ([7, 2, 3], [8, 2, 3], [[7]], [8], [-1, 1, 2, 3, 4, 5, 6, 7]),
        # two tokens become the anchor's last of two
        ([1, 6, 7, 3], [1, 8, 9, 3], [[6, 7]], [8, 9], [-1, -1, 3, 3, 4, 5, 6, 7]),
        # a synonym becomes the anchor like the concept, and what stands before it stays
        ([1, 2, 5, 3], [1, 2, 8, 3], [[7], [5]], [8], [-1, -1, -1, 3, 4, 5, 6, 7]),
        # a synonym of two tokens, and the concept again behind it
        ([1, 5, 6, 7], [1, 8, 2, 3], [[7], [5, 6]], [8], [-1, -1, 2, 2, 2, 5, 6, 7]),
        # a token of the concept's name elsewhere is not the concept
        ([6, 2, 6, 7], [6, 2, 8], [[6, 7]], [8], [-1, -1, -1, 3, 3, 5, 6, 7]),
    ],
)
def test_which_state_becomes_which(
    asked: list[int], instead: list[int], names: list[list[int]], anchor: list[int], expected: list[int]
) -> None:
    rows = [([START, *words] + [END] * 8)[:8] for words in (asked, instead)]
    assert closed_form.align(*rows, names, anchor, END) == expected


def moves(base: Base, pairs: list[Pair], names: list[str], anchor: str, keep: list[str]) -> list[Moves]:
    states = States.of(base, [p for pair in pairs for p in (pair.concept, pair.anchor)] + keep)
    return closed_form.moves(base, states, pairs, names, anchor, keep)


def test_states_in_front_of_the_concept_stay(sd1: Base) -> None:
    pair = Pair("a painting of a cat by monet", "a painting of a cat")
    (sums,) = moves(sd1, [pair], ["monet"], "", [])
    own = sd1.encode([pair.concept]).states[0].half().double()
    assert sums.m == 7 and sums.n == len(own) - 7  # start and six words
    assert torch.allclose(sums.kept, own[:7].T @ own[:7], rtol=1e-4, atol=1e-4)
    assert torch.allclose(sums.gram, own[7:].T @ own[7:], rtol=1e-4, atol=1e-4)


def test_a_synonym_moves_as_the_concept_does(sd1: Base) -> None:
    pairs = [Pair("a photo of a kitty", "a photo of a dog")]
    (sums,) = moves(sd1, pairs, ["cat", "kitty"], "dog", [])
    own, other = (sd1.encode([p]).states[0].half().double() for p in (pairs[0].concept, pairs[0].anchor))
    assert sums.m == 5  # start, a photo of a
    expected = (other[5:] - own[5:]).T @ own[5:]  # position by position: kitty to dog, end to end
    assert torch.allclose(sums.cross, expected, rtol=1e-3, atol=1e-3)


def test_an_edit_of_every_layer_is_one_pair(sd1: Base) -> None:
    pairs = [Pair("a cat", "a dog"), Pair("a photo of a cat", "a photo of a dog")]
    (edit,) = closed_form.edits(
        sd1, moves(sd1, pairs, ["cat"], "dog", []), rank=8, ridge=1e-3, keep_scale=4.0
    )
    assert edit.sites == sd1.sites(CROSS_KV)
    c, a = (sd1.encode([pair[i] for pair in [(p.concept, p.anchor) for p in pairs]]).states for i in (0, 1))
    moved = c + c @ edit.tensors["down"].T @ edit.tensors["into"].T
    assert (moved - a)[1, 5:].norm() < 0.5 * (c - a)[1, 5:].norm()
    widths = {sd1.module(site).weight.shape[1] for site in sd1.sites(CROSS_KV)}
    assert widths == {c.shape[-1]}


def test_two_encoders_and_the_pooled_text_are_moved_apart() -> None:
    base = tiny("sdxl")
    pairs = [Pair("a cat", "a dog"), Pair("a photo of a cat", "a photo of a dog")]
    states, pooled = closed_form.edits(
        base, moves(base, pairs, ["cat"], "dog", ["a house"]), rank=4, ridge=1e-2, keep_scale=4.0
    )
    first, second = (encoder.config.hidden_size for encoder in base.text_encoders)
    change = states.tensors["into"] @ states.tensors["down"]
    assert change.shape == (first + second,) * 2
    assert change[:first, :first].any() and change[first:, first:].any()
    assert not change[:first, first:].any() and not change[first:, :first].any()
    assert pooled.sites == ("unet.add_embedding.linear_1",)
    width = base.module(pooled.sites[0]).weight.shape[1]
    change = pooled.tensors["into"] @ pooled.tensors["down"]
    assert change.shape == (width, width)
    assert not change[second:].any() and not change[:, second:].any(), "time ids are not touched"
