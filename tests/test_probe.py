"""The gate that looks, learned: what is seen on the way, the threshold between, both error rates."""

from __future__ import annotations

from dataclasses import replace

import edits as some
import pytest
import torch

from conceptzap.base import CROSS, Base, Cond
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import guides, sight
from conceptzap.runtime.attach import attached, new_run
from conceptzap.runtime.guides import Guidance
from conceptzap.runtime.sampler import denoise
from conceptzap.training import probe
from conceptzap.training.probe import Seen

CHANNELS, STEPS = 12, 3


def seen(n: int, toward: float, seed: int, mixed: int = 0) -> Seen:
    """n pictures that lean along the first channel, with `mixed` of them the other way."""
    given = torch.nn.functional.normalize(some.randn(STEPS, n, CHANNELS, seed=seed), dim=-1)
    given[..., 0] += toward
    given[:, :mixed, 0] -= 2 * toward
    without = torch.nn.functional.normalize(some.randn(STEPS, n, CHANNELS, seed=seed + 1), dim=-1)
    without[..., 0] -= abs(toward)
    return Seen(given, without, torch.tensor([900.0, 700.0, 500.0]), torch.zeros(STEPS, n, 1, 1, 1))


def test_what_is_apart_is_told_apart() -> None:
    gate = probe.fit_gate([seen(24, 3.0, 0)], seen(40, -3.0, 2))
    assert gate.params["false_open"] | {"high": 0} == {"rate": 0.0, "low": 0.0, "high": 0, "n": 40}
    assert gate.params["false_shut"]["rate"] == 0.0 and gate.params["low"] == 500
    sight.check(gate)
    assert probe.looks(gate, seen(8, 3.0, 9)).min() > 0 > probe.looks(gate, seen(8, -3.0, 11)).max()


@pytest.mark.parametrize("n", [4, 60])
def test_fewer_pictures_than_channels_or_more_a_query_is_ridge_regression(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "KNOTS", STEPS)  # as many as there are steps
    concept, others = seen(n, 1.0, 0), seen(n + 2, -1.0, 2)
    query = probe._fit(concept, others)[0].double()
    for at, found in enumerate(query.flip(0)):  # times rise
        x = torch.cat([concept.pairs, others.pairs], 1)[at].double()
        x, y = x - x.mean(0), torch.cat([torch.ones(n), -torch.ones(n + 2)]).double()
        weight = torch.cat([torch.full((n,), 0.5 / n), torch.full((n + 2,), 0.5 / (n + 2))]).double()
        ridge = probe.RIDGE * (weight[:, None] * x**2).sum(0).mean()
        slope = x.T @ (weight * (x @ found - y)) + ridge * found
        assert slope.abs().max() < 1e-6, "not where the sum of squares is least"


def test_a_query_is_stored_in_a_byte_a_number() -> None:
    concept, others = seen(24, 3.0, 0), seen(40, -3.0, 2)
    gate = probe.fit_gate([concept, across(8, 5)], others)
    query, scale = gate.tensors["query"], gate.tensors["scale"]
    assert query.dtype == torch.int8 and query.abs().amax(-1).eq(127).all() and scale.shape == query.shape[:-1]
    exact = torch.stack([probe._fit(group, others)[0] for group in (concept, across(8, 5))], 1)
    assert ((query * scale[..., None] - exact).abs() <= 0.501 * scale[..., None]).all()


def test_what_one_half_hides_the_other_shows() -> None:
    """The rows with the prompt are like those of the others; behind them the unconditional ones are not."""
    concept, others = seen(24, 3.0, 0), seen(40, -3.0, 2)
    concept = replace(concept, given=others.given[:, :24], without=concept.without + 1.0)
    gate = probe.fit_gate([concept], others)
    assert gate.params["false_open"]["rate"] == gate.params["false_shut"]["rate"] == 0.0
    assert probe.looks(gate, concept).min() > 0 > probe.looks(gate, others).max()


def test_rows_that_stand_alone_have_a_threshold_of_their_own() -> None:
    concept, others = seen(24, 3.0, 0), seen(40, -3.0, 2)
    gate = probe.fit_gate([concept], others)
    for these, opens in ((seen(8, 3.0, 9).given, True), (seen(8, -3.0, 11).given, False), (others.without, False)):
        found = sight.paired(gate, these[0], torch.full((these.shape[1],), 900.0), None, 0)
        assert ((found > 0) == opens).all()


def test_one_doubtful_look_dulls_no_other() -> None:
    others = seen(40, -3.0, 2)
    others.given[0, 7, 0] = 3.0  # looks like the concept in the first step
    gate = probe.fit_gate([seen(24, 3.0, 0)], others)
    found = probe.looks(gate, seen(8, 3.0, 9))
    assert gate.params["false_open"]["rate"] == 0.0 and (found[1:] > 0.2).all()


def test_a_group_has_a_probe_of_its_own() -> None:
    """What one line cannot have on its side together with the rest; few pictures get none."""
    groups, others = [seen(24, 3.0, 0), across(8, 5)], seen(40, -3.0, 2)
    alone, both, few = (
        probe.fit_gate(some, others) for some in (groups[:1], groups, [groups[0], groups[1].rows([0, 1])])
    )
    assert [len(gate.tensors["query"][0]) for gate in (alone, both, few)] == [1, 2, 1]
    assert few == alone and both.params["false_shut"] == alone.params["false_shut"]
    found = across(8, 20)
    assert (probe.looks(alone, found) > 0).float().mean() < 0.5
    assert (probe.looks(both, found) > 0).all() and probe.looks(both, seen(8, -3.0, 11)).max() <= 0


def across(n: int, seed: int) -> Seen:
    """Pictures between the concept's and the others' that lean along a channel of their own."""
    found = seen(n, 0.0, seed)
    for half in (found.given, found.without):
        half[..., 0] -= 3.0
        half[..., 1] += 3.0
    return found


def test_what_cannot_be_told_apart_is_said() -> None:
    gate = probe.fit_gate([seen(24, 3.0, 0, mixed=6)], seen(40, -3.0, 2, mixed=4))
    assert gate.params["false_open"]["rate"] == 0.0 and gate.params["false_shut"]["rate"] > 0.05


def test_an_unconditional_row_alone_must_not_open_the_gate() -> None:
    others = seen(40, -3.0, 2)
    alike = others.without.clone()
    alike[..., 0] += 6.0
    gate = probe.fit_gate([seen(24, 3.0, 0)], replace(others, without=alike))
    assert (sight.paired(gate, alike[0], torch.full((40,), 900.0), None, 0) < 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_looks_at_the_first_steps_of_every_prompt(
    sd1: Base, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    monkeypatch.setattr(probe, "ROWS", 2)
    prompts = some.ASKED
    found = probe.watch(replace(sd1, prediction=prediction), prompts, 0, Report(), "looking")
    channels = sum(sd1.unet.config.block_out_channels)  # of the decoder's two blocks
    assert found.given.shape == found.without.shape == (probe.LOOKED, len(prompts), channels)
    assert found.latents.shape == (probe.LOOKED, len(prompts), *sd1.latent_shape)
    assert (found.times.diff() < 0).all() and found.latents[0].equal(sd1.noise(range(3)))
    assert not found.given[0].equal(found.without[0]) and found.ends is None


def test_pictures_may_be_drawn_to_their_end(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ROWS", 2)
    early, whole = (probe.watch(sd1, some.ASKED, 0, Report(), "looking", ends=ends) for ends in (False, True))
    settings = Settings(steps=probe.DENOISING, guidance=probe.GUIDANCE)
    walk = denoise(sd1, sd1.encode(some.ASKED), sd1.unconditional(), settings, sd1.noise(range(3)))
    *_, (_, last) = ((t, x.clone()) for t, x in walk)
    assert some.far(whole.ends, last) < 1e-5
    assert whole.given.equal(early.given) and whole.latents.equal(early.latents)
    assert whole.rows([2]).joined(whole).ends is None and whole.joined(whole).ends.shape[0] == 6


def test_looks_at_text_states_and_under_edits(sd1: Base) -> None:
    plain = probe.watch(sd1, some.ASKED, 0, Report(), "looking")
    states = probe.watch(sd1, sd1.encode(some.ASKED), 0, Report(), "looking")
    edited = probe.watch(sd1, some.ASKED, 0, Report(), "looking", [some.tokens(sd1)])
    assert states.given.equal(plain.given) and not edited.given.equal(plain.given)


def test_what_is_learned_opens_where_it_is_attached(sd1: Base) -> None:
    """The same numbers in the gate of an attachment as in the fit: of pairs, and of what stands alone."""
    given = probe.watch(sd1, some.ASKED, 0, Report(), "looking")
    gate = probe.fit_gate([given], probe.watch(sd1, some.OTHER, 50, Report(), "looking"))
    edit = some.tokens(sd1, gates=[gate])
    x, cond, without = given.latents[0], sd1.encode(some.ASKED), sd1.unconditional()[[0] * 3]
    with torch.no_grad(), sight.margins_seen() as margins, attached(sd1.unet, [edit]):
        with Guidance(lambda rows: rows // 2).told():
            sd1.predict(x.repeat(2, 1, 1, 1), given.times[0], Cond.cat([without, cond]))
        new_run(sd1.unet)
        sd1.predict(x, given.times[0], cond)
    lone = sight.paired(gate, given.given[0], given.times[:1].expand(3), None, 0) - gate.params["threshold"]
    assert torch.allclose(margins[1][0], lone, atol=1e-5)
    assert torch.allclose(margins[0][0, 3:], torch.maximum(lone, probe.looks(gate, given)[0]), atol=1e-5)
    assert margins[0][0, :3].eq(-torch.inf).all()  # behind these no prompt stands


def test_a_negative_prompt_does_not_shut_the_gate() -> None:
    """Whatever the unconditional row shows, the concept's own row opens it by itself."""
    gate = probe.fit_gate([seen(24, 3.0, 0)], seen(40, -3.0, 2))
    shown, other = seen(4, 3.0, 9), seen(4, -3.0, 11)
    q = (gate.tensors["query"] * gate.tensors["scale"][..., None])[-1, 0, CHANNELS:]  # of the unconditional row
    against = shown.without[0] - 5 * q / (q @ q)  # turned to shut it
    times = torch.full((8,), 900.0)
    assert (probe.looks(gate, replace(shown, without=against[None].expand(3, -1, -1)))[0] < 0).all()
    for rows, opens in ((shown.given[0], True), (other.given[0], False)):
        found = sight.paired(gate, torch.cat([against, rows]), times, None, 4)[4:]
        assert ((found > 0) == opens).all()


def test_what_was_erased_alone_sets_the_threshold_where_the_text_names_it() -> None:
    """The concept, what stays near it and, far from both, what was erased."""
    def seen(n: int, first: float) -> probe.Seen:
        parts = [0.1 * some.randn(2, n, 3, seed=seed) for seed in (n, n + 1)]
        for part in parts:
            part[..., 0] += first
        return probe.Seen(*parts, torch.tensor([900.0, 800.0]), torch.zeros(2, n, 1))

    concept, near, gone = seen(8, 1.0), seen(12, 0.4), seen(6, -1.0)
    gate = probe.fit_gate([concept], near.joined(gone), len(gone), ["named"])
    assert gate.params["told"] == ["named"] and (gate.tensors["eased"] < gate.tensors["offset"] - 0.3).all()
    for these, told, opens in ((concept, False, True), (near, False, False), (near, True, True), (gone, True, False)):
        found = probe.looks(gate, these, torch.full((len(these),), told))
        assert (found > 0).any(0).eq(opens).all(), (len(these), told)
    assert "eased" not in probe.fit_gate([concept], near.joined(gone)).tensors


def test_it_looks_once_a_call_whatever_is_made_anew(sd1: Base) -> None:
    """The first run of a call, as gates do: not the one with what another gate has opened, nor a guide's own."""
    (site, *_), asked = sd1.sites(CROSS), ["a church", "a cat"]
    edit = replace(some.tokens(sd1), sites=(site,))
    early = replace(edit, gates=(some.always(sd1, times=(999,)),))
    plain, from_the_first, anew, steered = (
        probe.watch(sd1, asked, 0, Report(), "looking", edits)
        for edits in ((), (edit,), (early,), (guides.guide(sd1, "swap", ("a church", "a house"), {}),))
    )
    assert anew.given[0].equal(plain.given[0]) and not anew.given[0].equal(from_the_first.given[0])
    assert torch.allclose(anew.given[1:], from_the_first.given[1:], atol=1e-5)
    assert steered.given.shape == plain.given.shape and steered.given[0].equal(plain.given[0])
