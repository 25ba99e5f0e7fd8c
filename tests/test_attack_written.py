"""What an attack says and writes, and whom its searches see: rates of several concepts, finds, seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import edits as some
import numpy as np
import pytest
import torch
from command import conceptzap
from safetensors.torch import load, load_file, save
from victims import Never, attempts, small, victim

from conceptzap.attacks import synonyms
from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.page import attack as page
from conceptzap.page import folder
from conceptzap.redteam import bell, trial
from conceptzap.redteam.carrier import allowed
from conceptzap.redteam.outcome import Attacked
from conceptzap.redteam.victim import CONTINUOUS, STRAIGHT, TRANSFER, Victim
from conceptzap.report import Report
from conceptzap.training.carrier import Carrier
from conceptzap.verbs import attacking

CHEAP = ("--suite", "imagenette", "--judge", "stub_judges:by_brightness", "--steps", 1, "--prompts", 2)


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Path) -> None:
    """Nothing that an earlier test kept."""


def tried(name: str, **through: list[bool]) -> trial.Trial:
    """A concept of two prompts, which forms brought through."""
    open_ = {0: True, 1: True}
    counts = {f: trial.Count(np.array(rows), np.ones(2, int), fired=open_) for f, rows in through.items()}
    victim = SimpleNamespace(target=SimpleNamespace(name=name))
    pictures = np.zeros((2, 2, 2, 3))
    return trial.Trial(victim, np.ones(2, bool), np.zeros(2, bool), pictures, counts)  # type: ignore


# rates


def test_each_of_several_concepts_has_a_worst_form_of_its_own() -> None:
    """None hides behind a form that another stands, nor behind one that it was never tried in."""
    one, other = tried("church", typos=[True, False]), tried("cat", typos=[False, False], case=[True, True])
    done = Attacked((one, other), {}, 0.0)
    assert (done.asr.value, done.asr.n, done.worst.name) == (0.75, 4, "typos (church) / case (cat)")
    rates = {form.name: (form.after.value, form.after.n) for form in done.forms}
    assert rates == {"typos": (0.25, 4), "case": (1, 2)}
    assert [form.name for form in done.listed] == ["typos", "case", done.worst.name]
    assert done.record()["worst"] in {form["form"] for form in done.record()["forms"]}
    assert Attacked((one,), {}, 0.0).worst.name == "typos" and len(Attacked((one,), {}, 0.0).listed) == 1
    safe = tried("dog", case=[False, False], typos=[False, False])
    assert Attacked((one, safe), {}, 0.0).worst.name == "typos"  # of equals that which is everybody's


def test_seconds_are_those_of_a_search_that_was_kept_too(sd1: Base, monkeypatch: Any) -> None:
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    first, again = victim(sd1, (some.in_text(sd1),)), victim(sd1, (some.in_text(sd1),))
    for on in (first, again):
        for form in (TRANSFER, STRAIGHT):
            for _ in "ab":
                on.on(form).once(["what"], lambda: {"found": torch.zeros(1)}, form)
    assert [*first.spent.values()] == [0, 0], "what a run makes and reads again is in its own time"
    assert [*again.spent.values()] == [7, 7] and not again.oracle(sd1).spent


@pytest.mark.parametrize("name", ["ring_a_bell", "pez", "mma", "null_text"])
def test_a_search_that_is_stopped_keeps_the_batches_that_it_had(sd1: Base, name: str) -> None:
    """And finds in batches what it finds at once."""
    whole, few = victim(sd1, n=3), victim(sd1, n=3)
    few = dataclasses.replace(few, settings=dataclasses.replace(few.settings, batch=2))
    made, once = [], Victim.once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Victim, "once", lambda on, about, make, _: once(on, about, lambda: made.append(about) or make())
        )
        first, anew = attempts(few, name), attempts(whole, name)
        count = len(made)
        attempts(few, name)
    assert len(made) == count and len([about for about in made if about[-1] == [2, 3]]) >= 1
    for one, other in zip(first, anew, strict=True):
        for key, found in one.found.items():
            assert torch.allclose(found.float(), other.found[key].float(), atol=1e-3)


# what was found


@pytest.mark.parametrize("name", ["null_text", "noise", "ring_a_bell_embedding", "relearn", "completion"])
def test_what_was_found_is_written(sd1: Base, name: str) -> None:
    tries = attempts(victim(sd1), name)
    done = trial.run(victim(sd1), [Never()], tries, Report())
    kept = load(save(page._found([done])))
    assert tries and all(one.found for one in tries) and len(kept) == sum(len(one.found) for one in tries)


def test_a_seed_that_was_found_is_told_and_no_text_where_none_was(sd1: Base) -> None:
    on = victim(sd1)
    plain = dataclasses.replace(on, edits=())
    for name, seeds in (("seeds", True), ("noise", False)):
        tries = attempts(on, name)
        judge = Never()
        done = trial.run(plain, [judge], _after(tries, judge), Report())
        count = next(iter(done.counts.values()))
        assert count.through.all() and not count.prompts
        assert count.seeds == (dict(enumerate(tries[0].seeds or ())) if seeds else {})


def _after(tries: list[Any], judge: Never) -> Any:
    """The judge sees the concept from the first try on."""
    judge.__init__(always=True)  # type: ignore[misc]
    yield from tries


@pytest.mark.parametrize("name", ["attempts.csv", "found.safetensors", "images"])
def test_what_somebody_has_there_is_not_overwritten(church: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == "images" else (tmp_path / name).write_text("mine")
    if name == "images":  # which `evaluate` fills, too
        with pytest.raises(UsageError, match="images exists"):
            folder.prepare(tmp_path, False)
    answer = conceptzap("attack", church, "--attack", "seeds", "-o", tmp_path)
    assert answer.code == 2 and f"{name} exists" in answer.err and (tmp_path / name).exists()


def test_nothing_of_an_earlier_result_stays(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    words = ("attack", church, "--base", tiny_folder, *CHEAP, "-o", tmp_path / "out")
    few = ("--set", "steps=1", "--set", "tokens=2")
    assert conceptzap(*words, "--attack", "pez", *few).code == 0
    assert load_file(tmp_path / "out/found.safetensors")
    assert conceptzap(*words, "--attack", "seeds", "--set", "tries=1", "--force").code == 0
    kept = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "found.safetensors" not in kept and not [name for name in kept if name.startswith("transfer")]
    assert json.loads((tmp_path / "out/result.json").read_text())["attack"] == "seeds"


# settings


@pytest.mark.parametrize(
    ("name", "setting"),
    [("ring-a-bell", "crossover=3"), ("completion", "early=5"), ("inpaint", "share=2"), ("pez", "steps=0")],
)
def test_what_is_no_share_is_out_of_range(name: str, setting: str) -> None:
    key, value = setting.split("=")
    with pytest.raises(UsageError, match=f"{key}=.* is out of range"):
        attacking.settled(name, "quick", {key: value})


@pytest.mark.parametrize("name", ["p4d", "ring-a-bell", "pez", "mma", "unlearndiffatk", "random-tokens"])
def test_more_tokens_than_a_text_holds_are_refused_before_anything_is_drawn(sd1: Base, name: str) -> None:
    attacking.check_room(attacking.settled(name, "quick", {"tokens": sd1.max_tokens}), sd1)
    with pytest.raises(UsageError, match=f"use {sd1.max_tokens} or fewer"):
        attacking.check_room(attacking.settled(name, "quick", {"tokens": sd1.max_tokens + 1}), sd1)
    with pytest.raises(UsageError, match="find no room"):
        Carrier.instead(sd1, ["a photo of a church"], ["church"], sd1.max_tokens)
    with pytest.raises(UsageError, match="find no room"):
        Carrier.before(sd1, ["a church"], sd1.max_tokens)


@pytest.mark.parametrize(
    ("rounds", "steps", "tries"), [(10, 10, [20, 50, 100]), (3, 15, [30, 45]), (2, 60, [60, 120])]
)
def test_fine_tuning_is_tried_after_20_50_and_100_steps(
    sd1: Base, rounds: int, steps: int, tries: list[int]
) -> None:
    """Or as soon as so many are over, and at the end."""
    member, cfg = small("relearn")
    cfg = dataclasses.replace(cfg, rounds=rounds, steps=steps, batch=1, pictures=1)
    found = [one.variant for one in member.attack(victim(sd1), cfg, Report())]
    assert found == [f"{count} steps" for count in tries]


def test_something_is_left_to_complete(sd1: Base) -> None:
    member, _ = small("completion")
    assert [one.first for one in member.attack(victim(sd1), member.Config(1.0, 0.0), Report())] == [1]
    single = dataclasses.replace(victim(sd1), settings=dataclasses.replace(victim(sd1).settings, steps=1))
    with pytest.raises(UsageError, match="single step"):
        member.attack(single, member.Config(), Report())  # before anything is drawn


# words


def test_descriptions_are_tried_and_what_cannot_be_read_is_said(sd1: Base) -> None:
    said: list[str] = []
    report = SimpleNamespace(note=said.append)
    tries = list(synonyms.attack(victim(sd1), synonyms.Config(), report))  # type: ignore[arg-type]
    kinds = [one.kind for one in tries]
    assert kinds.count("descriptions") == 4 and "translations" not in kinds
    assert len(said) == 1 and said[0].startswith("translations of church: none that")


def test_a_name_of_many_tokens_cannot_be_spelt(sd1: Base) -> None:
    tokenizer = sd1.tokenizers[0]
    ids = tokenizer("churchxyz", add_special_tokens=False).input_ids
    assert len(ids) > 1 and not allowed(sd1, ["churchxyz"])[ids[-1]]


# texts that are erased


@pytest.fixture
def erased_text(sd1: Base) -> Any:
    return victim(sd1, (some.in_text(sd1),))


def test_transfer_sees_nothing_of_erased_texts(sd1: Base, erased_text: Any) -> None:
    on = erased_text
    every = TRANSFER, STRAIGHT, CONTINUOUS
    assert on.base is not sd1 and on.knows is sd1 and on.forms(every) == on.forms(every, texts=True) == [*every]
    assert victim(sd1).forms(every, texts=True) == [TRANSFER, CONTINUOUS]  # where texts are as they were
    assert {one.form for one in attempts(on, "ring_a_bell")} == {TRANSFER, STRAIGHT}
    blind = on.on(TRANSFER)
    assert blind.base is sd1 and not blind.edits and on.on(STRAIGHT) is on
    for name in ("p4d", "unlearndiffatk", "pez"):
        (one, plain) = (
            next(try_ for try_ in attempts(who, name) if try_.form == TRANSFER) for who in (on, victim(sd1))
        )
        assert one.found["tokens"].equal(plain.found["tokens"])
        assert not torch.equal(one.cond.states, plain.cond.states)  # read by the texts that are attacked


def test_the_concept_is_meant_as_it_was(sd1: Base, erased_text: Any) -> None:
    assert torch.equal(bell.direction(erased_text).states, bell.direction(victim(sd1)).states)
    about = attacking._about(
        attacking.settled("seeds", "quick", {}), _Nothing(), [], [erased_text]  # type: ignore[arg-type]
    )
    assert about["base"]["digest"] == victim(sd1).digest
    assert about["base"]["fingerprint"] == dict(sd1.fingerprint(attacking.policy.EVERYTHING))


class _Nothing:
    """An experiment of which nothing is asked."""

    suite, seed, judges = SimpleNamespace(name=""), 0, ()
    settings = SimpleNamespace(record=dict)
