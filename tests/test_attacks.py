"""Attacks do what they are published to do, on the tiny base: mechanics, budgets, seeds, taking up."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import edits as some
import numpy as np
import pytest
import stub_judges  # noqa: F401  (named on the command line)
import torch
from browser import faults, needs_axe
from command import conceptzap
from safetensors.torch import load_file

from conceptzap.attacks import inpaint, synonyms
from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import MismatchError, ThresholdError, UsageError
from conceptzap.evaluation import probes
from conceptzap.evaluation.comparison import Prediction
from conceptzap.evaluation.probes import Subject, World
from conceptzap.redteam import bell, discrete, inverting, search, trial
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.carrier import allowed, without
from conceptzap.training.carrier import Carrier, split
from conceptzap.redteam.outcome import Attacked
from conceptzap.redteam.victim import CONTINUOUS, EVADE, STRAIGHT, TRANSFER, Victim
from conceptzap.registry import config, family
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import gates
from conceptzap.runtime.attach import attached
from conceptzap.verbs import attacking

SMALL = {
    "rounds": 2, "steps": 1, "pictures": 2, "batch": 2, "tries": 2, "tokens": 2, "tokens_object": 2,
    "population": 4, "generations": 2, "candidates": 2, "best": 4, "most": 2,
}  # fmt: skip
WORLD = World(
    tuple(Subject(name, "object", words) for name, words in
          {"church": ("church", "castle"), "cat": ("cat",), "dog": ("dog",), "tree": ("tree",)}.items()),
    {"": (("a photo of {a}", "a picture of {a}"), ("a drawing of {a}",))},
)  # fmt: skip
GRADIENT = ("unlearndiffatk", "p4d")


class Never:
    """A judge that sees the concept in no picture, or (`always`) in every one."""

    name, digest, kinds = "never", "0", {"object": ("church",)}

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def predict(self, pictures: np.ndarray) -> Prediction:
        n, label = len(pictures), "church" if self.always else "cat"
        nothing = np.zeros((n, 0), np.float32)
        return Prediction({"object": [(label,)] * n}, {"object": [(1.0,)] * n}, np.ones(n, bool), nothing)


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Path) -> None:
    """Nothing that an earlier test kept."""


def victim(base: Base, edits: tuple[Edit, ...] | None = None, n: int = 2) -> Victim:
    subject = WORLD.find("church")
    suite = probes.Suite("s", "", (), {"seen": n - 1, "held-out": 1}, {})
    asked = probes.expand(suite, WORLD, [subject])
    edits = some.erasure(base).edits if edits is None else edits
    look = Settings(steps=2, guidance=3.0, batch=4)
    return Victim.of(base, edits, subject, world=WORLD, probes=asked, settings=look, seed=0)


def small(name: str) -> tuple[Any, Any]:
    """An attack and settings of it that a test can afford."""
    member = family.load("attacks", name)
    fields = {field.name for field in dataclasses.fields(member.Config)}
    return member, config.resolve(member.Config, {k: v for k, v in SMALL.items() if k in fields})


def attempts(on: Victim, name: str) -> list[Attempt]:
    member, cfg = small(name)
    return list(member.attack(on, cfg, Report()))


def same(one: Attempt, other: Attempt) -> bool:
    conds = [a.cond if isinstance(a.cond, (list, tuple)) else [a.cond] for a in (one, other)]
    states = all(
        torch.equal(x.states, y.states) if x is not None else y is None
        for x, y in zip(*conds, strict=True)
    )
    latents = one.latents is None or torch.equal(one.latents, other.latents)
    return states and latents and (one.prompts, one.seeds) == (other.prompts, other.seeds)


# every attack


@pytest.mark.parametrize("name", family.members("attacks"))
def test_an_attack_is_whole(sd1: Base, name: str) -> None:
    """Forms as published, every probe tried at every attempt, nothing left on the base."""
    on = victim(sd1)
    member, cfg = small(name)
    before = {key: value.clone() for key, value in sd1.unet.state_dict().items()}
    done = trial.run(on, [Never()], member.attack(on, cfg, Report()), Report())
    assert done.counts and all((c.tries > 0).all() for c in done.counts.values())
    named = {kind.partition(",")[0] for kind in done.counts}
    assert set(getattr(member, "FORMS", ())) <= named
    assert all(torch.equal(value, before[key]) for key, value in sd1.unet.state_dict().items())
    assert not sd1.unet._forward_pre_hooks
    assert set(member.PAPER_SETTINGS) <= {field.name for field in dataclasses.fields(member.Config)}


@pytest.mark.parametrize("name", ["p4d", "synonyms", "noise", "mma"])
def test_the_same_attack_finds_the_same(sd1: Base, name: str, monkeypatch: Any) -> None:
    first = attempts(victim(sd1), name)
    monkeypatch.setattr(Victim, "once", lambda self, about, make, form="": make())  # nothing kept
    again = attempts(victim(sd1), name)
    assert len(first) == len(again) and all(map(same, first, again))


def test_a_stopped_search_goes_on(sd1: Base, monkeypatch: Any) -> None:
    """Round 2 begins where round 1 ended, Adam's moments included, whatever happened between."""
    on, member = victim(sd1), family.load("attacks", "p4d")
    _, cfg = small("p4d")
    made = []
    once = Victim.once
    monkeypatch.setattr(
        Victim, "once",
        lambda self, about, make, form="": once(self, about, lambda: made.append(about) or make(), form),
    )
    whole = list(member.attack(on, cfg, Report()))
    count = len(made)
    stopped: Iterator[Attempt] = member.attack(on, dataclasses.replace(cfg, evade=0.7), Report())
    next(stopped)
    stopped.close()
    assert len(made) == count + 1  # the base's pictures were kept from the first attack
    taken_up = list(member.attack(on, dataclasses.replace(cfg, evade=0.7), Report()))
    assert len(made) == count + len(whole)
    monkeypatch.setattr(Victim, "once", lambda self, about, make, form="": make())
    anew = list(member.attack(on, dataclasses.replace(cfg, evade=0.7), Report()))
    assert all(map(same, taken_up, anew))


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
    on = victim(sd1)
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


def test_transfer_never_sees_the_erasure(sd1: Base) -> None:
    """Searched on the base, tried on the erased model: with and without edits it finds the same."""
    for name in GRADIENT:
        with_edits, bare = (
            [a for a in attempts(victim(sd1, edits), name) if a.form == TRANSFER] for edits in (None, ())
        )
        assert all(torch.equal(a.cond.states, b.cond.states) for a, b in zip(with_edits, bare, strict=True))


# what single attacks are


@pytest.mark.parametrize("name", ["inversion", "relearn", "p4d"])
def test_a_search_lowers_what_it_says_it_lowers(sd1: Base, name: str, monkeypatch: Any) -> None:
    """The mean loss of the last steps is under that of the first ones, on the same noise."""
    member, cfg = small(name)
    seen: list[float] = []
    real = torch.autograd.backward

    def watched(loss: torch.Tensor, **rest: Any) -> None:
        seen.append(loss.item())
        real(loss, **rest)

    monkeypatch.setattr(torch.autograd, "backward", watched)
    monkeypatch.setattr(Victim, "generator", lambda self, *_: torch.Generator().manual_seed(0))
    kind = {"inversion": {"fewest": 1, "most": 1}}.get(name, {})
    cfg = dataclasses.replace(cfg, rounds=1, steps=25, lr=0.02, **kind)
    next(iter(member.attack(victim(sd1), cfg, Report())))
    assert len(seen) == 25 and seen[-1] < seen[0]


def test_inversion_runs_a_walk_backwards(sd1: Base) -> None:
    """DDIM from the inverted noise, without guidance, comes back to the picture it was made of."""
    on = victim(sd1, ())
    on = dataclasses.replace(on, settings=Settings(steps=20, guidance=1.0, batch=4))
    clean, nothing = on.remembered(Report()), sd1.encode([""]).repeat(2)
    noise = inverting.start(on, TRANSFER, clean, nothing)
    from conceptzap.runtime.sampler import denoise

    with torch.no_grad():
        *_, (_, again) = denoise(sd1, nothing, sd1.unconditional(), on.settings, noise)
    other = sd1.noise([7, 8])
    with torch.no_grad():
        *_, (_, far) = denoise(sd1, nothing, sd1.unconditional(), on.settings, other)
    assert (again - clean).norm() < 0.1 * (far - clean).norm()


def test_null_text_leaves_no_prompt(sd1: Base) -> None:
    """One state a step, none of them a prompt's, and no text gate is ever open."""
    found, = attempts(victim(sd1), "null_text")
    assert len(found.cond) == 2 and found.guidance == 1.0
    done = trial.run(victim(sd1), [Never()], [found], Report())
    count, = done.counts.values()
    gated_only = all(edit.gates for edit in victim(sd1).edits)
    assert not gated_only or not any(count.fired.values())


def test_the_simplex_is_kept() -> None:
    rows = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    found = discrete.simplex(rows)
    assert (found >= 0).all() and torch.allclose(found.sum(-1), torch.ones(3, 2), atol=1e-5)
    assert torch.allclose(discrete.simplex(found), found, atol=1e-6)


def test_nearest_tokens_are_their_own_nearest(sdxl: Base) -> None:
    on, usable = victim(sdxl), allowed(sdxl, ())
    ids = discrete.begin(on, 3, 4, usable)
    assert torch.equal(discrete.nearest(on, discrete.joined(on, ids), usable), ids)


def test_breeding_comes_nearer(sd1: Base) -> None:
    on, (member, cfg) = victim(sd1), small("ring_a_bell")
    wanted = bell.target(on, 3.0).states

    def far(generations: int) -> float:
        chosen = dataclasses.replace(cfg, population=12, generations=generations, tokens=8)
        ids = member._evolved(on, chosen, allowed(sd1, on.words), Report())
        return float(bell.far(bell.states(on, ids), wanted).mean())

    assert far(40) < far(1)


def test_exchanging_tokens_comes_nearer(sd1: Base) -> None:
    on, (member, cfg) = victim(sd1), small("mma")
    carrier = Carrier.alone(sd1, 2, 4)
    wanted = sd1.encode(on.prompts)

    def near(steps: int) -> float:
        chosen = dataclasses.replace(cfg, tokens=4, steps=steps, candidates=4, best=16)
        ids = member._searched(on, chosen, TRANSFER, carrier, allowed(sd1, on.words), Report())
        return float(discrete.alike(carrier.written(ids), wanted).mean())

    assert near(8) > near(1)


def test_wordings() -> None:
    assert synonyms.reworded("a Church on a hill", ("church",), "kirk") == "a kirk on a hill"
    assert synonyms.reworded("a cat", ("church",), "kirk") == "a cat, kirk"
    typos = synonyms.typos("Van Gogh")
    assert len(set(typos)) == 3 and "Van Gogh" not in typos


def test_wordings_name_nothing_that_the_base_cannot_read(sd1: Base) -> None:
    kinds = synonyms.kinds(victim(sd1))
    assert kinds["synonyms"] == ["castle"] and "translations" not in kinds
    assert all("church" not in kinds[kind] for kind in kinds)


def test_controls_spend_as_many_tries(sd1: Base) -> None:
    for name in ("seeds", "random_tokens"):
        tried = attempts(victim(sd1), name)
        assert family.load("attacks", name).CONTROL and len(tried) == 2 and not same(*tried)


# a model that never knew the concept


def test_an_oracle_is_searched_on_itself_and_learns_from_who_knows(sd1: Base) -> None:
    on = victim(sd1)
    other = dataclasses.replace(sd1, unet=copy.deepcopy(sd1.unet))
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.5)
    never = on.oracle(other)
    assert not never.edits and never.digest != on.digest
    assert torch.equal(never.remembered(Report()), on.remembered(Report()))
    assert never.forms((TRANSFER, STRAIGHT, EVADE, CONTINUOUS)) == [STRAIGHT, CONTINUOUS]
    assert never.forms((TRANSFER, EVADE)) == [TRANSFER]  # where the text encoder is all that is searched
    x, t, cond = sd1.noise([0]), torch.tensor([500]), sd1.encode(["a cat"])
    assert torch.equal(never.eps(STRAIGHT, x, t, cond), other.eps(x, t, cond))
    done = trial.run(never, [Never()], attempts(never, "p4d"), Report())
    assert set(done.counts) == {STRAIGHT, CONTINUOUS}
    assert all((count.tries == 2).all() for count in done.counts.values())


def test_an_oracle_of_other_latents_is_refused(sd1: Base) -> None:
    other = dataclasses.replace(sd1, vae=copy.deepcopy(sd1.vae))
    with torch.no_grad():
        next(iter(other.vae.parameters())).add_(1)
    with pytest.raises(MismatchError, match="other latents"):
        victim(sd1).oracle(other)


# counting


def test_what_came_through_is_not_tried_again(sd1: Base) -> None:
    on = victim(sd1, ())
    done = trial.run(on, [Never(always=True)], attempts(on, "seeds"), Report())
    count, = done.counts.values()
    assert done.before.all() and not count.tries.any()  # it was shown unattacked: nothing is left to break
    whole = Attacked((done,), {"attack": "seeds"}, 0.0)
    assert whole.asr.value == 1.0 and whole.worst.newly.n == 0


def test_rates_count_what_was_shown_before() -> None:
    made = trial.Count(np.array([False, True, False, False]), np.array([0, 1, 2, 2]))
    made.fired = {1: False, 2: True, 3: True}
    before = np.array([True, False, False, False])
    one = trial.Trial(None, np.ones(4, bool), before, np.zeros((4, 2, 2, 3)), {"transfer": made})  # type: ignore
    whole = Attacked((one,), {}, 0.0)
    assert (whole.before.value, whole.asr.value) == (0.25, 0.5)
    form = whole.worst
    assert (form.newly.value, form.newly.n, form.pictures, form.shut) == (1 / 3, 3, 5, 1)
    assert form.newly.low < 1 / 3 < form.newly.high
    assert (whole.recoverability.value, whole.recoverability.n) == (1 / 3, 3)
    attacking.enforce(whole, {"ASR": 0.5, "before": 0.25})
    with pytest.raises(ThresholdError, match=r"ASR is 50.0% of 4, over 10.0%; newly is") as raised:
        attacking.enforce(whole, {"ASR": 0.1, "before": 0.3, "newly": 0.1})
    assert raised.value.exit_code == 7 and raised.value.made is whole


def test_recovered_is_what_any_form_brought_back_of_what_the_base_draws() -> None:
    flags = np.array([True, True, True, False])
    forms = {
        name: trial.Count(np.array(through), np.ones(4, int))
        for name, through in {"a": [True, False, False, True], "b": [False, True, False, False]}.items()
    }
    before, pictures = np.array([False, False, True, False]), np.zeros((4, 2, 2, 3))
    one = trial.Trial(None, flags, before, pictures, forms)  # type: ignore
    back = Attacked((one,), {}, 0.0).recoverability
    assert (back.value, back.n) == (1.0, 2)  # the third was shown unattacked, the fourth by nobody


def test_fail_over_is_read() -> None:
    assert attacking.parse(["ASR=10", "newly=0"]) == {"ASR": 0.1, "newly": 0.0}
    for bad in ("ASR", "ASR=x", "ASR=101", "E=10"):
        with pytest.raises(UsageError, match="fail-over"):
            attacking.parse([bad])


def test_names_and_budgets_are_checked() -> None:
    with pytest.raises(UsageError, match="no attack is called 'inversoin'"):
        attacking.settled("inversoin", "quick", {})
    with pytest.raises(UsageError, match="no budget"):
        attacking.settled("inversion", "fast", {})
    with pytest.raises(UsageError, match="unknown setting"):
        attacking.settled("seeds", "quick", {"rounds": 3})
    with pytest.raises(UsageError, match="out of range"):
        attacking.settled("seeds", "quick", {"tries": 0})
    quick = attacking.settled("ring-a-bell", "quick", {})
    paper = attacking.settled("ring-a-bell", "paper", {"tokens": "38"})
    assert (quick.config.generations, paper.config.generations, paper.config.tokens) == (80, 3000, 38)
    assert (quick.n, paper.n, attacking.settled("seeds", "quick", {}, 3).n) == (16, 64, 3)


# the command


CHEAP = ("--suite", "imagenette", "--judge", "stub_judges:by_brightness", "--steps", 1, "--prompts", 2)


@pytest.fixture(scope="module")
def attacked(
    church: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any], Any]:
    """A folder, the words that were given for it, and the answer."""
    words = ["attack", church, "--attack", "random-tokens", "--base", tiny_folder, *CHEAP, "--set", "tries=1"]
    out = tmp_path_factory.mktemp("attacked") / "out"
    return out, words, conceptzap(*words, "-o", out, "--json")


@needs_axe
def test_nothing_keeps_anybody_from_reading_its_page(attacked: Any, tmp_path: Path) -> None:
    assert faults((attacked[0] / "report.html").read_text(), tmp_path) == []


def test_the_command(attacked: Any) -> None:
    out, words, answer = attacked
    assert answer.code == 0, answer
    said = answer.json
    assert said["schema"] == "conceptzap.attack/1" and said["asr"]["n"] == 2
    kept = json.loads((out / "result.json").read_text())
    assert kept["worst"] == said["worst"] and kept["config"] == {"tries": 1, "tokens": 5}
    rows = list(csv.DictReader((out / "attempts.csv").open()))
    assert len(rows) == 2 and rows[0]["concept"] == "church"
    page = (out / "report.html").read_text()
    assert "a control" in page and page.count("<figure") == [row["before"] for row in rows].count("0")
    again = conceptzap(*words, "-o", out)
    assert again.code == 2 and "exists" in again.err
    once_more = conceptzap(*words, "-o", out, "--force")
    assert once_more.code == 0 and "(ASR)" in once_more.out
    assert json.loads((out / "result.json").read_text())["forms"] == kept["forms"]


def test_the_command_keeps_what_was_found(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ("--set", "steps=1", "--set", "tokens=2")
    answer = conceptzap(
        "attack", church, "--attack", "pez", "--base", tiny_folder, "--oracle", tiny_folder, *CHEAP, *few,
        "-o", out, "-q",
    )  # fmt: skip
    kept = json.loads((out / "result.json").read_text())
    assert [form["form"] for form in kept["oracle"]["forms"]] == [
        "transfer, unnamed", "transfer, named", "continuous",
    ]  # fmt: skip
    assert "never knew it" in (out / "report.html").read_text()
    assert answer.code == 0 and answer.out.strip() == str(out / "result.json")
    found = load_file(out / "found.safetensors")
    assert found["church/transfer, named/1/tokens"].shape == (2, 2)


def test_over_the_limit_is_exit_7(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    words = ("attack", church, "--attack", "seeds", "--base", tiny_folder, *CHEAP, "--set", "tries=1")
    answer = conceptzap(*words, "--fail-over", "ASR=100", "-o", tmp_path / "a")
    assert answer.code == 0, answer
    rate = json.loads((tmp_path / "a/result.json").read_text())["asr"]["value"]
    if rate:
        over = conceptzap(*words, "--fail-over", "ASR=0", "-o", tmp_path / "b", "--json")
        assert over.code == 7 and over.json["error"]["kind"] == "ThresholdError"
        assert (tmp_path / "b/result.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attack", "nothing"), "no attack is called"),
        (("--attack", "seeds", "--budget", "x"), "no budget"),
        (("--attack", "seeds", "--fail-over", "E=1"), "no such rate"),
        (("--attack", "seeds", "--prompts", "0"), "out of range"),
        (("--attack", "seeds", "--set", "x"), "is not key=value"),
    ],
)
def test_bad_requests_are_usage_errors(church: Path, words: tuple[str, ...], message: str) -> None:
    answer = conceptzap("attack", church, *words)
    assert answer.code == 2 and message in answer.err
