"""What every attack stands on: drawing from conditioning, free tokens, gradients, gates that are soft."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import edits as some
import pytest
import stub_judges  # noqa: F401  (named on the command line)
import torch
from victims import GRADIENT, attempts, small, victim

from conceptzap.attacks import inpaint
from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Gate
from conceptzap.redteam import discrete, search
from conceptzap.redteam.carrier import allowed, without
from conceptzap.redteam.victim import CONTINUOUS, EVADE, STRAIGHT, TRANSFER, Victim
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import gates, guides
from conceptzap.runtime.attach import attached
from conceptzap.training.carrier import Carrier, split


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Path) -> None:
    """Nothing that an earlier test kept."""


# the seams


def test_drawing_from_conditioning_is_drawing_from_prompts(base: Base) -> None:
    from conceptzap.runtime.sampler import Start, drawings, drawings_from

    look, prompts, seeds = Settings(steps=3, guidance=3.0, batch=2), ["a cat", "a dog", "a church"], [1, 2, 3]
    edits = some.erasure(base).edits
    start = Start(base.encode(prompts), base.noise(seeds))
    found = list(drawings_from(base, start, look, edits))
    for one, (picture, fired) in zip(drawings(base, prompts, seeds, look, edits), found, strict=True):
        assert torch.equal(one.picture, picture) and one.fired == fired


@pytest.mark.parametrize("first", [1, 2])
def test_a_walk_goes_on_from_any_step(sd1: Base, first: int) -> None:
    on = victim(sd1, ())
    on = dataclasses.replace(on, settings=Settings(steps=3, guidance=3.0))
    walk = on.walk(on.prompts, on.seeds)
    from conceptzap.runtime.sampler import denoise

    cond, uncond = sd1.encode(on.prompts), sd1.unconditional()
    with torch.no_grad():
        rest = list(denoise(sd1, cond, uncond, on.settings, walk[first][1], first))
    assert [t for t, _ in rest] == [t for t, _ in walk[first:]]
    assert torch.equal(rest[-1][1], walk[-1][1])


def test_what_is_known_stays_in_the_picture(sd1: Base) -> None:
    from conceptzap.runtime.sampler import Start, _batch

    on = victim(sd1, ())
    clean, mask = on.remembered(Report()), inpaint.middle(8, 8, 0.5)
    start = Start(sd1.encode(on.prompts), sd1.noise(on.seeds), known=clean, mask=mask)
    latents, _ = _batch(sd1, lambda: start, on.settings, (), None)
    outside = (mask == 0).expand_as(latents)
    assert torch.equal(latents[outside], clean[outside]) and not torch.equal(latents, clean)
    assert mask.sum() == 16


def test_an_attacker_sees_what_guidance_makes_of_rows_without_a_prompt(sd1: Base) -> None:
    """By what is returned the plain base draws, guided, what the erased model draws."""
    edits = (some.halved(sd1, gates=[some.gate(sd1)]),)
    on, cond = victim(sd1, edits, n=2), sd1.encode([some.ASKED[0], some.OTHER[1]])
    x, t = sd1.noise([0, 1]), torch.full((2,), some.TIME)
    none, weight = sd1.unconditional()[[0, 0]], on.settings.guidance
    with torch.no_grad():
        seen, plain = on.eps(STRAIGHT, x, t, cond), sd1.eps(x, t, none)
        with attached(sd1, edits), guides.Guidance(lambda rows: rows // 2).told():
            moved, given = sd1.eps(x.repeat(2, 1, 1, 1), t.repeat(2), Cond.cat([none, cond])).chunk(2)
    drawn = moved + weight * (given - moved)
    assert some.far(plain + weight * (seen - plain), drawn) < 1e-4
    assert some.far(seen[0], given[0]) > 1e-3 and some.far(seen[1], given[1]) < 1e-5


def test_free_tokens_are_the_tokens_that_stand_there(base: Base) -> None:
    """Embeddings of a text's own tokens in the free places give that text's states."""
    carrier = Carrier.instead(base, ["a photo of a church", "a red church"], ["church"], 2)
    ids = torch.tensor([base.tokenizers[0]("big cat", add_special_tokens=False).input_ids] * 2)
    on = victim(base)
    wanted = base.encode(["a photo of a big cat", "a red big cat"])
    found = carrier.states(discrete.embedded(on, ids))
    assert torch.allclose(found.states, wanted.states, atol=1e-5)
    assert torch.equal(carrier.written(ids).states, wanted.states)
    assert carrier.texts(ids)[1] == "a red big cat"
    assert all(not table._forward_hooks for table in (e.get_input_embeddings() for e in base.text_encoders))
    assert without(base, "a red church", ["church"]) == "a red"


def test_gradients_reach_the_free_tokens_through_text_and_unet(base: Base) -> None:
    on, carrier = victim(base), Carrier.before(base, ["a church"], 2)
    free = [one.requires_grad_() for one in discrete.embedded(on, torch.tensor([[5, 6]]))]
    clean = torch.zeros(1, *base.latent_shape)
    cond = carrier.states(free)
    error = search.noise_error(on, STRAIGHT, cond, clean, on.generator(0), torch.tensor([500]))
    found = torch.autograd.grad(error.sum(), free)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_what_knows_the_concept_teaches_without_noise(sd1: Base) -> None:
    """Towards its own estimate the prompt itself has no error at all, whatever noise was drawn."""
    on = victim(sd1, (some.tokens(sd1),))
    cond, clean = sd1.encode(on.prompts), torch.zeros(2, *sd1.latent_shape)
    t, other = torch.tensor([100, 900]), sd1.encode(["a cat"] * 2)
    noisy, exact, apart = (
        search.noise_error(on, TRANSFER, asked, clean, on.generator(0), t, wanted)
        for asked, wanted in ((cond, None), (cond, cond), (other, cond))
    )
    assert (noisy > 0).all() and not exact.any() and (apart > 0).all()
    assert search.noise_error(on, STRAIGHT, cond, clean, on.generator(0), t, cond).max() > 0  # erased


def test_inversions_searches_share_what_the_base_sees(sd1: Base, monkeypatch: Any) -> None:
    """Asked for once, many steps a call, and the same that each step would have asked for by itself."""
    on, (member, cfg) = victim(sd1), small("inversion")
    clean, wanted = on.remembered(Report())[:2], sd1.encode(on.prompts[:2])
    aims = member._aims(on, cfg, on.prompts[:2], clean, Report())  # [steps, batch, c, h, w]
    assert len(aims) == cfg.rounds * cfg.steps
    for step, aim in enumerate(aims):
        rows, t, x, _ = member._drawn(on, cfg, clean, on.generator(step))
        with torch.no_grad():
            assert torch.allclose(aim, sd1.eps(x, t, wanted[rows]), atol=1e-5)
    asked: list[Any] = []
    once = Victim.once
    monkeypatch.setattr(
        Victim, "once", lambda self, about, *rest: asked.append(about[0]) or once(self, about, *rest)
    )
    list(member.attack(on, cfg, Report()))
    assert asked.count("inversion-aims") == 1 and asked.count("search") == 3 * 2 * cfg.rounds


def test_the_concepts_words_are_barred(sd1: Base) -> None:
    usable, tokenizer = allowed(sd1, ["church", "Van Gogh"]), sd1.tokenizers[0]
    for word in ("church", "van", "gogh"):
        assert not usable[tokenizer(word, add_special_tokens=False).input_ids[0]]
    assert not usable[tokenizer.all_special_ids].any() and usable.sum() > 100
    on = victim(sd1)
    usable = allowed(sd1, on.words)
    for name in ("ring_a_bell", "pez", "mma"):
        found = {a.variant: a.found["tokens"] for a in attempts(on, name) if a.form == TRANSFER}
        assert set(found) == {"named", "unnamed"} and usable[found["unnamed"]].all()


# gates


def gated(base: Base) -> tuple[Edit, ...]:
    return tuple(edit for edit in some.erasure(base).edits if edit.gates)


def test_a_gate_is_as_hard_as_ever_and_has_a_gradient(base: Base) -> None:
    edits, on = some.erasure(base).edits, victim(base)
    assert on.gates
    cond = base.encode(list(some.ASKED))
    latents, t = base.noise(range(len(cond))), torch.tensor(500)

    def drawn(states: torch.Tensor) -> torch.Tensor:
        with attached(base.unet, edits):
            return base.eps(latents, t, dataclasses.replace(cond, states=states))

    hard = drawn(cond.states)
    states = cond.states.clone().requires_grad_()
    with gates.straight_through():
        soft = drawn(states)
    assert torch.allclose(soft, hard, atol=1e-5)
    margin = gates.margins(on.gates[0], states)
    assert torch.equal((margin > 0).float(), gates.scores(on.gates[0], states).amax(-1).gt(
        on.gates[0].params["threshold"]).float())
    with gates.straight_through():
        said = gates.Panel(edits).text(states).match
    assert said.requires_grad and torch.equal(said.detach(), said.detach().round())
    slope, = torch.autograd.grad(said.sum(), states)
    assert slope.abs().sum() > 0 and slope.isfinite().all()
    assert not gates.Panel(edits).text(states).match.requires_grad  # outside the block nothing has


def test_shut_rows_beside_open_ones_have_finite_gradients(sd1: Base) -> None:
    edits = some.erasure(sd1).edits
    cond = sd1.encode([some.ASKED[0], some.OTHER[0]])
    states = cond.states.clone().requires_grad_()
    with gates.straight_through(), attached(sd1.unet, edits):
        seen = sd1.eps(sd1.noise([0, 1]), torch.tensor(500), dataclasses.replace(cond, states=states))
    gradient, = torch.autograd.grad(seen.pow(2).sum(), states)
    assert gradient.isfinite().all()


def test_evasion_counts_only_where_it_is_asked_for(sd1: Base) -> None:
    on, cond = victim(sd1), sd1.encode([some.ASKED[0]])
    assert on.evasion(EVADE, cond).item() > 0 and on.evasion(CONTINUOUS, cond).item() > 0
    assert on.evasion(TRANSFER, cond).item() == on.evasion(STRAIGHT, cond).item() == 0
    assert victim(sd1, ()).evasion(EVADE, cond).item() == 0


def test_a_gate_that_looks_is_shown_pairs_as_a_sampler_shows_them(sd1: Base) -> None:
    """By what searches through the gate: its prediction is of the rows with the prompt, erased or not."""
    shut = some.always(sd1, (-1.0,))
    pairs = {"query": torch.zeros(1, 2 * shut.tensors["query"].shape[1]), "alone": shut.tensors["offset"]}
    for level, opens in ((1.0, True), (-1.0, False)):
        offset = torch.tensor([-level])
        gate = Gate("sight", shut.params, shut.tensors | pairs | {"offset": offset})
        edit = some.tokens(sd1, gates=[gate])
        on = victim(sd1, (edit,))
        prompts, t = ["a church", "a cat"], torch.tensor([some.TIME] * 2)
        x, cond = sd1.noise([0, 1]), sd1.encode(prompts)
        with torch.no_grad():
            plain, found = (on.eps(form, x, t, cond) for form in (TRANSFER, EVADE))
        erased = some.eps(sd1, prompts, [dataclasses.replace(edit, gates=())])
        assert torch.allclose(found, erased if opens else plain, atol=1e-4)
        assert not torch.allclose(erased, plain, atol=1e-3)
        assert on.evasion(EVADE, cond).tolist() == pytest.approx([1.2, 1.2] if opens else [0.0, 0.0])


def test_evading_lowers_the_gates_margins(sd1: Base) -> None:
    """A search for nothing but evasion shuts the gate that its start had opened."""
    on = victim(sd1)
    carrier = Carrier.before(sd1, [some.ASKED[0]], 4)
    usable = allowed(sd1, ())
    start = {"v": discrete.joined(on, discrete.begin(on, 1, 4, usable))}

    def margin(v: torch.Tensor) -> torch.Tensor:
        return sum(gates.margins(g, carrier.states(split(on.base, v)).states) for g in on.gates)

    pace = search.Pace(1, 30, 0.3)
    found = list(search.search(on, EVADE, "evasion", start, lambda v, *_: margin(v["v"]).sum(), pace, Report()))
    assert margin(found[-1]["v"]).item() < margin(start["v"]).item()


def test_a_form_that_is_asked_for_is_the_one_that_it_does_not_differ_from(sd1: Base) -> None:
    """Without gates to evade, or edits to search through, another name for what is searched anyway."""
    every = (TRANSFER, STRAIGHT, EVADE, CONTINUOUS)
    gated, plain, bare = victim(sd1), victim(sd1, (some.shared(sd1),)), victim(sd1, ())
    for on, found in ((gated, EVADE), (plain, STRAIGHT), (bare, TRANSFER), (gated.oracle(sd1), STRAIGHT)):
        assert dataclasses.replace(on, only=(EVADE,)).forms(every) == [found]
        assert dataclasses.replace(on, only=(CONTINUOUS, EVADE)).forms(every) == [found, CONTINUOUS]
        assert found in on.forms(every)
    assert dataclasses.replace(gated.oracle(sd1), only=(TRANSFER,)).forms(every) == [STRAIGHT]
    assert plain.forms([STRAIGHT, EVADE], texts=True) == [STRAIGHT]  # there is no other that it could be
    assert plain.forms([TRANSFER, EVADE]) == [TRANSFER, EVADE]


def test_transfer_never_sees_the_erasure(sd1: Base) -> None:
    """Searched on the base, tried on the erased model: with and without edits it finds the same."""
    for name in GRADIENT:
        with_edits, bare = (
            [a for a in attempts(victim(sd1, edits), name) if a.form == TRANSFER] for edits in (None, ())
        )
        assert all(torch.equal(a.cond.states, b.cond.states) for a, b in zip(with_edits, bare, strict=True))
