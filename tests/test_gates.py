"""Gates: how strongly an edit acts on each row of a UNet call."""

from __future__ import annotations

from dataclasses import replace

import edits as some
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptzap.base import CROSS_KV, Base, Cond
from conceptzap.edit import Edit, Gate
from conceptzap.errors import MismatchError
from conceptzap.runtime.attach import attached
from conceptzap.runtime.gates import Detectors, Panel, Signal, check, factor, scores

QUERY = {"query": torch.eye(3), "mean": torch.zeros(3)}


def factors(gates: list[Gate], states: torch.Tensor, times: list[float]) -> list:
    edit = Edit("weight", ("unet.x",), {}, gates=tuple(gates))
    return factor(edit, Signal(states, torch.tensor(times))).tolist()


def rows(n: int) -> torch.Tensor:
    return torch.zeros(n, 4, 3)


def test_none_is_always() -> None:
    assert factors([], rows(2), [0.0, 999.0]) == [1.0, 1.0]


def test_a_window_has_its_ends_in_it() -> None:
    times = [99.0, 100.0, 250.0, 300.0, 301.0]
    assert factors([some.window(100, 300)], rows(5), times) == [0, 1, 1, 1, 0]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_curve_is_linear_between_its_points(data: st.DataObject) -> None:
    times = sorted(data.draw(st.sets(st.integers(0, 999), min_size=1, max_size=6)))
    levels = st.floats(0, 1, width=32)
    values = data.draw(st.lists(levels, min_size=len(times), max_size=len(times)))
    asked = data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=5))
    gate = Gate("curve", {}, {"times": torch.tensor(times).float(), "values": torch.tensor(values)})
    found = factors([gate], rows(len(asked)), [float(t) for t in asked])
    assert np.allclose(found, np.interp(asked, times, values), atol=1e-5)


def test_a_curve_stays_between_0_and_1() -> None:
    tensors = {"times": torch.tensor([0.0, 900.0]), "values": torch.tensor([-2.0, 3.0])}
    assert factors([Gate("curve", {}, tensors)], rows(2), [0.0, 950.0]) == [0.0, 1.0]


def test_match_takes_the_best_position_and_ignores_length() -> None:
    states = torch.tensor([[[0.1, 0.0, 0.0], [3.0, 4.0, 0.0]], [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]])
    gate = Gate("match", {"threshold": 0.75}, QUERY)
    assert scores(gate, states).tolist()[0] == pytest.approx([1.0, 0.8])
    assert factors([gate], states, [0.0, 0.0]) == [1, 0]
    assert factors([gate], 1e-3 * states, [0.0, 0.0]) == [1, 0]
    assert factors([gate], states.half(), [0.0, 0.0]) == [1, 0]


def test_the_threshold_itself_is_shut() -> None:
    states = torch.tensor([[[1.0, 0.0, 0.0]]])
    assert factors([Gate("match", {"threshold": 1.0}, QUERY)], states, [0.0]) == [0]


def test_gates_multiply_and_positions_stay_apart() -> None:
    states = torch.tensor([[[1.0, 0, 0], [-1.0, 0, 0]], [[-1.0, 0, 0], [1.0, 0, 0]]])
    token = Gate("token", {"threshold": 0.5}, QUERY)
    half = Gate("curve", {}, {"times": torch.tensor([0.0]), "values": torch.tensor([0.5])})
    window = some.window(0, 10)
    for order in ([token, half, window], [window, half, token], [half, token, window]):
        assert factors(order, states, [5.0, 11.0]) == [[0.5, 0], [0, 0]]


def test_zero_states_are_shut() -> None:
    """SDXL's empty negative prompt is all zeros: never NaN, never open, also where the mean is not."""
    tensors = {"query": torch.eye(3), "mean": torch.tensor([-5.0, 0.0, 0.0])}
    states = torch.zeros(2, 4, 3)
    states[1, 0] = torch.tensor([1.0, 0, 0])
    assert factors([Gate("match", {"threshold": 0.5}, tensors)], states, [0.0, 0.0]) == [0, 1]
    assert factors([Gate("token", {"threshold": 0.5}, tensors)], states, [0.0, 0.0]) == [[0] * 4, [1, 0, 0, 0]]
    assert not scores(Gate("match", {"threshold": 0.5}, tensors), states).isnan().any()


def test_parts_are_at_unit_length_each() -> None:
    """What one encoder says cannot be drowned by the length of what the other says."""
    tensors = {"query": torch.tensor([[1.0, 0, 0, 0]]), "mean": torch.zeros(4)}
    whole, halves = (Gate("match", {"threshold": 0.9, **more}, tensors) for more in ({}, {"parts": [2, 2]}))
    states = torch.tensor([[[1.0, 0.0, 30.0, 40.0]], [[0.0, 1.0, 0.0, 0.0]]])
    assert factors([whole], states, [0.0, 0.0]) == [0, 0]
    assert factors([halves], states, [0.0, 0.0]) == [1, 0]
    assert scores(halves, states).tolist() == [[1.0], [0.0]]
    for parts in ([2], [2, 3], [6, -2], ["2", "2"], [True, 3]):
        with pytest.raises(MismatchError, match="wide"):
            check(Gate("match", {"threshold": 0.9, "parts": parts}, tensors), 4)


def random_gate(seed: int, **more: object) -> Gate:
    count = 1 + seed % 4
    tensors = {"query": 4 * some.randn(count, 8, seed=seed), "mean": some.randn(8, seed=seed + 1) / 8}
    return Gate("match", {"threshold": 3.0, **more}, tensors)


def test_many_gates_are_read_as_one_by_one() -> None:
    """Different numbers of queries, halves and wholes, shared gates, half precision: one reading."""
    states = some.randn(6, 5, 8, seed=99)
    gates = [random_gate(seed, **({"parts": [3, 5]} if seed % 3 else {})) for seed in range(30)]
    gates += [replace(gates[0], tensors={s: t.half() for s, t in gates[0].tensors.items()})]
    edits = [Edit("weight", (f"unet.{i}",), {}, gates=(gate, gates[0])[: 1 + i % 2]) for i, gate in enumerate(gates)]
    panel = Panel(edits)
    found = panel.strengths(panel.text(states), None).rows
    alone = torch.stack([factor(edit, Signal(states, torch.zeros(6))) for edit in edits])
    assert found.equal(alone) and 0 < found.mean() < 1
    assert len(panel.match) == len({gate.name for gate in gates})


def test_a_timed_gate_does_not_make_the_text_be_read_again(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text gates once a text and once a gate; timed ones at every step, and the strengths are right."""
    timed = some.adapter(sd1, gates=[some.window(400, 600), some.gate(sd1)])
    edits = [some.tokens(sd1, gates=[some.gate(sd1)]), some.shared(sd1, gates=[some.gate(sd1)]), timed]
    read, found = [], Detectors.scores
    monkeypatch.setattr(Detectors, "scores", lambda *given: read.append(len(given[0].query)) or found(*given))
    cond, latents = sd1.encode([some.ASKED[0], some.OTHER[0]]), sd1.noise([0, 1])
    with attached(sd1.unet, edits) as receipt, torch.no_grad():
        drawn = [sd1.eps(latents, t, cond) for t in (800, 600, 500, 300)]
        assert read == [1]
        sd1.eps(latents, 800, sd1.encode(some.OTHER[:2]))
        assert read == [1, 1]
    assert [(t.open, t.shut) for t in receipt.tallies] == [(4, 6), (4, 6), (2, 8)]
    for t, seen in zip((800, 600, 500, 300), drawn, strict=True):
        acting = edits if 400 <= t <= 600 else edits[:2]
        with attached(sd1.unet, [replace(edit, gates=(some.gate(sd1),)) for edit in acting]), torch.no_grad():
            assert some.far(sd1.eps(latents, t, cond), seen) < 1e-5


def test_reads_states_not_prompts(base: Base) -> None:
    """Any length, any weighting, and text states that no prompt has."""
    gate = some.gate(base)
    asked, other = base.encode(some.ASKED).states, base.encode(some.OTHER[:3]).states
    variants = (asked, 1.4 * asked, torch.cat([asked, other], 1), torch.cat([other, asked], 1))
    for states in (*variants, asked.flip(1), asked.half()):
        assert factors([gate], states, [0.0] * 3) == [1, 1, 1]
    for states in (other, 0.7 * other, torch.cat([other, other], 1)):
        assert factors([gate], states, [0.0] * 3) == [0, 0, 0]


def test_a_token_gate_changes_its_positions_only(sd1: Base) -> None:
    token = Gate("token", {"threshold": 0.0}, some.gate(sd1).tensors)
    states = sd1.encode([some.ASKED[1]]).states
    score = scores(token, states)
    gate = replace(token, params={"threshold": score.median().item()})
    edit = some.delta(sd1, CROSS_KV, gates=[gate])
    module = sd1.module(edit.sites[0])
    seen = []
    handle = module.register_forward_hook(lambda m, args, output: seen.append(output))
    some.eps(sd1, [some.ASKED[1]])
    handle.remove()
    with attached(sd1.unet, [edit]):
        handle = module.register_forward_hook(lambda m, args, output: seen.append(output))
        with torch.no_grad():
            sd1.eps(sd1.noise([0]), some.TIME, sd1.encode([some.ASKED[1]]))
        handle.remove()
    same = (seen[0] == seen[1]).all(-1)
    assert same.equal(score <= gate.params["threshold"]) and same.any() and not same.all()


@pytest.mark.parametrize("pattern", ["unet.*.attn1.to_k", "unet.*.attn2.to_q", some.FEED])
def test_a_token_gate_belongs_on_keys_and_values(sd1: Base, pattern: str) -> None:
    gate = Gate("token", {"threshold": 0.0}, some.gate(sd1).tensors)
    edit = some.delta(sd1, pattern, gates=[gate])
    for wrong in (edit, some.tokens(sd1, gates=[gate])):
        with pytest.raises(MismatchError, match="'token' gate cannot stand"):
            some.eps(sd1, ["a cat"], [wrong])


def test_gates_of_the_right_shape_pass() -> None:
    check(Gate("match", {"threshold": 0.5}, QUERY), 3)
    check(some.window(0, 9), 3)
    times = {"times": torch.tensor([0.0, 1.0]), "values": torch.tensor([1.0, 0.0])}
    check(Gate("curve", {}, times), 3)


@pytest.mark.parametrize("kind", ["match", "token"])
@pytest.mark.parametrize(
    ("query", "mean"), [((2, 4), (4,)), ((2, 3), (4,)), ((2, 4), (3,)), ((3,), (3,)), ((2, 3), (1, 3))]
)
def test_a_query_of_another_width_is_refused(kind: str, query: tuple, mean: tuple) -> None:
    gate = Gate(kind, {"threshold": 0.5}, {"query": torch.ones(query), "mean": torch.ones(mean)})
    with pytest.raises(MismatchError, match="wide"):
        check(gate, 3)


@pytest.mark.parametrize(
    ("times", "values"),
    [([0.0], [1.0]), ([0.0, 1.0], [1.0]), ([1.0, 1.0], [0.0, 1.0]), ([2.0, 1.0], [0.0, 1.0])]
    + [([[0.0, 1.0]], [[0.0, 1.0]]), (0.0, 1.0)],
)
def test_a_curve_without_rising_times_is_refused(times: object, values: object) -> None:
    gate = Gate("curve", {}, {"times": torch.tensor(times), "values": torch.tensor(values)})
    with pytest.raises(MismatchError, match="rising times"):
        check(gate, 3)


def test_gates_are_checked_before_anything_is_attached(sd1: Base, sd2: Base) -> None:
    before = some.hooks(sd1)
    with pytest.raises(MismatchError, match="wide"), attached(
        sd1.unet, [some.tokens(sd1), some.shared(sd1, gates=[some.gate(sd2)])]
    ):
        pass
    assert some.hooks(sd1) == before


def soft(base: Base, **params: float) -> Gate:
    """Of the fitted gate: its score at a prompt about it is full, at one that is not shut."""
    hard = some.gate(base)
    states = base.encode([some.ASKED[1], some.OTHER[1]]).states
    full, low = (scores(hard, states[[row]]).max().item() for row in (0, 1))
    parts = {key: value for key, value in hard.params.items() if key == "parts"}
    return Gate("similar", {"threshold": low, "full": full, **parts, **params}, dict(hard.tensors))


def test_a_soft_gate_opens_as_far_as_a_text_comes_near(base: Base) -> None:
    """0 at the threshold, 1 at `full`, the power of the share between them."""
    ends = base.encode([some.OTHER[1], some.ASKED[1]]).states
    mixed = torch.stack([torch.lerp(ends[0], ends[1], share) for share in (0.0, 0.3, 0.6, 1.0)])
    gate, squared = soft(base), soft(base, power=2.0)
    found = scores(gate, mixed).amax(-1)
    low, full = gate.params["threshold"], gate.params["full"]
    wanted = ((found - low) / (full - low)).clamp(0, 1)
    assert wanted[0] == 0 and wanted[3] > 0.999 and 0 < wanted[1:3].min() < 1
    for one, power in ((gate, 1), (squared, 2)):
        edit = Edit("weight", ("unet.x",), {}, gates=(one,))
        assert torch.allclose(factor(edit, Signal(mixed, torch.zeros(4))), wanted**power, atol=1e-4)


def test_an_edit_behind_a_soft_gate_is_as_strong_as_it_is_open(sd1: Base) -> None:
    edit = some.shared(sd1, gates=[soft(sd1)])
    states = sd1.encode([some.OTHER[1], some.ASKED[1]]).states
    cond = Cond(torch.lerp(states[:1], states[1:], 0.5))
    share = factor(edit, Signal(cond.states, torch.zeros(1))).item()
    assert 0 < share < 1
    drawn = []
    for edits in ([edit], [replace(edit, gates=(), scale=share)]):
        with attached(sd1.unet, edits), torch.no_grad():
            drawn.append(sd1.eps(sd1.noise([0]), some.TIME, cond))
    assert some.far(drawn[0], drawn[1]) < 1e-5
    assert some.eps(sd1, some.OTHER[1:2], [edit]).equal(some.eps(sd1, some.OTHER[1:2]))


def test_a_soft_gate_that_is_full_below_its_threshold_is_refused(sd1: Base) -> None:
    with pytest.raises(MismatchError, match="full below its threshold"):
        check(soft(sd1, full=-9.0), some.width(sd1))
