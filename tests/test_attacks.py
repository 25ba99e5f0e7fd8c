"""Attacks do what they are published to do, on the tiny base: mechanics, budgets, seeds, taking up."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stub_judges  # noqa: F401  (named on the command line)
import torch
from victims import Never, attempts, small, victim

from conceptzap.attacks import synonyms
from conceptzap.base import Base, load_base
from conceptzap.errors import MismatchError
from conceptzap.redteam import bell, discrete, inverting, spelling, trial
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.carrier import allowed
from conceptzap.redteam.victim import CONTINUOUS, EVADE, STRAIGHT, TRANSFER, Victim
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.training.carrier import Carrier


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Path) -> None:
    """Nothing that an earlier test kept."""


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
    texts = name in ("mma", "pez", "ring_a_bell")  # which see no diffusion model
    assert set(on.forms(getattr(member, "FORMS", ()), texts)) <= named
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


# what single attacks are


@pytest.mark.parametrize("name", ["inversion", "relearn", "p4d"])
def test_a_search_lowers_what_it_says_it_lowers(sd1: Base, name: str, monkeypatch: Any) -> None:
    """The mean loss of the last steps is under that of the first ones, on the same noise."""
    on, (member, cfg) = victim(sd1), small(name)
    seen: list[float] = []
    real = torch.autograd.backward

    def watched(loss: torch.Tensor, **rest: Any) -> None:
        seen.append(loss.item())
        real(loss, **rest)

    monkeypatch.setattr(torch.autograd, "backward", watched)
    monkeypatch.setattr(Victim, "generator", lambda self, *_: torch.Generator().manual_seed(0))
    kind = {"inversion": {"fewest": 1, "most": 1}}.get(name, {})
    cfg = dataclasses.replace(cfg, rounds=1, steps=8, lr=0.02, **kind)
    next(iter(member.attack(on, cfg, Report())))
    assert len(seen) == 8 and seen[-1] < seen[0]


def test_inversion_runs_a_walk_backwards(sd1: Base) -> None:
    """DDIM from the inverted noise, without guidance, comes back to the picture it was made of."""
    on = victim(sd1, ())
    on = dataclasses.replace(on, settings=Settings(steps=8, guidance=1.0, batch=4))
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
        ids = member._evolved(on, chosen, allowed(sd1, on.words), slice(0, 2), Report())
        return float(bell.far(bell.states(on, ids), wanted).mean())

    assert far(40) < far(1)


def test_exchanging_tokens_comes_nearer(sd1: Base) -> None:
    on, (member, cfg) = victim(sd1), small("mma")
    carrier = Carrier.alone(sd1, 2, 4)
    wanted = sd1.encode(on.prompts)

    def near(steps: int) -> float:
        chosen = dataclasses.replace(cfg, tokens=4, steps=steps, candidates=4, best=16)
        ids = member._searched(on, chosen, TRANSFER, carrier, allowed(sd1, on.words), slice(0, 2), Report())
        return float(discrete.alike(carrier.written(ids), wanted).mean())

    assert near(8) > near(1)


def test_a_thing_is_told_from_another_by_all_states_of_its_text() -> None:
    """On the built-in checkpoint: another word for it is nearer than another thing, by far."""
    base = load_base("demo")
    wanted, chapel, cat = (base.encode([f"a photo of a {word}"]) for word in ("church", "chapel", "cat"))
    assert discrete.alike(chapel, wanted) > 0.9 > 0.6 > discrete.alike(cat, wanted)


def test_wordings() -> None:
    assert spelling.reworded("a Church on a hill", ("church",), "kirk") == "a kirk on a hill"
    assert spelling.reworded("a cat", ("church",), "kirk") == "a cat, kirk"
    for prompt in ("a photo of a church", "a photo of The church", "a photo of church"):
        assert spelling.reworded(prompt, ("church",), "a tall house") == "a photo of a tall house"
    assert spelling.reworded("an apple, An APPLE", ("apple",), "a p p l e") == "an a p p l e, An a p p l e"
    assert spelling.reworded("an apple", ("apple",), "The Fruit") == "The Fruit"
    assert spelling.reworded("a photo of a scan", ("scan",), "an X-ray") == "a photo of an X-ray"
    assert spelling.reworded("a an-church", ("church",), "a kirk") == "a an-a kirk"
    assert spelling.reworded("drama church", ("church",), "the kirk") == "drama the kirk"
    assert spelling.slips("church", 2) == ("chruch", "chrch", "chuurch")
    typos = synonyms.typos("Van Gogh")
    assert len(set(typos)) == 3 and "Van Gogh" not in typos


def test_wordings_name_nothing_that_the_base_cannot_read(sd1: Base) -> None:
    kinds = synonyms.kinds(victim(sd1))
    assert kinds["synonyms"] == ["castle"] and not kinds["translations"] and len(kinds["descriptions"]) == 4
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
