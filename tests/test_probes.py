"""Suites and their probes: which prompts are asked, in which slices, with which seeds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.evaluation import probes, suites
from conceptzap.evaluation.comparison import Annotation
from conceptzap.registry import config


def test_every_suite_of_the_package_expands_to_what_it_says() -> None:
    for name in suites.names():
        suite, world = suites.load(name)
        target = world.subjects[0]
        asked = probes.expand(suite, world, [target], world.of_kind(target.kind)[1:4], sealed_by="x")
        counts = Counter(probe.slice.partition("/")[0] for probe in asked)
        assert counts["erase"] == sum(suite.erase.values()), name
        assert counts["keep"] == sum(suite.keep.values()), name
        assert len({(p.prompt, p.seed) for p in asked}) == len(asked), f"{name} repeats a sample"


@pytest.mark.parametrize("concept", ["Van Gogh", "church", "elephant"])
def test_kept_probes_never_name_what_is_erased(concept: str) -> None:
    suite, world = suites.load("standard")
    target = world.find(concept)
    asked = probes.expand(suite, world, [target], sealed_by="x")
    words = {word.lower() for word in (*target.words, *target.held_out)}
    for probe in asked:
        padded = f" {probe.prompt.lower()} "
        named = any(f" {word} " in padded.replace(",", " ") for word in words)
        assert named == probe.erases, probe


def test_held_out_probes_use_no_template_that_erasing_may_train_on() -> None:
    suite, world = suites.load("quick")
    seen, held_out = world.templates["Van Gogh"]
    asked = probes.expand(suite, world, [world.find("Van Gogh")])
    things = [subject.words[0] for subject in world.of_kind("object")]
    trained = {probes.fill(template, thing) for template in seen for thing in things}
    assert not trained & {p.prompt for p in asked if p.slice == "erase/held-out"}
    assert trained >= {p.prompt for p in asked if p.slice == "erase/seen"}
    assert held_out


def test_a_synonym_is_its_concept() -> None:
    suite, world = suites.load("smoke")
    assert world.find("kitty").name == "cat" and world.find("VAN GOGH").name == "Van Gogh"
    with pytest.raises(UsageError, match="no prompts for 'unicorn'"):
        suites.find(suite, world, ["unicorn"])


def test_a_suite_that_erases_nothing_does_not_ask_for_what_is_gone() -> None:
    about, world = suites.load("coco")
    left = suites.without(world, ["Dog", "church"])
    assert len(left.subjects) == len(world.subjects) - 1
    assert not any("dog" in probe.prompt for probe in probes.expand(about, left, ()))


def test_the_split_covers_every_concept_once() -> None:
    _, world = suites.load("smoke")
    names = [name for part in world.split.values() for name in part]
    assert sorted(names) == sorted(subject.name for subject in world.subjects)
    assert world.share("Van Gogh") == world.share("church") == "dev"


def test_sealed_probes_follow_the_digest_and_leave_the_rest_alone() -> None:
    suite, world = suites.load("quick")
    one, other = (probes.expand(suite, world, [world.find("church")], sealed_by=d) for d in "ab")
    different = {p.slice for p, q in zip(one, other, strict=True) if p != q}
    assert different == {"erase/sealed"}
    assert probes.digest(one) == probes.digest(other)
    open_ = {p.prompt for p in one if p.slice != "erase/sealed"}
    assert not open_ & {p.prompt for p in one if p.slice == "erase/sealed"}


def test_another_seed_asks_other_probes() -> None:
    suite, world = suites.load("quick")
    one, other = (probes.expand(suite, world, [world.find("church")], seed=seed) for seed in (0, 1))
    assert probes.digest(one) != probes.digest(other)
    assert not {p.seed for p in one} & {p.seed for p in other}


def test_neighbours_come_half_from_text_and_half_from_confusion() -> None:
    _, world = suites.load("smoke")
    text, confused = ([world.find(n) for n in names.split()] for names in ("cat dog fox owl", "dog bee"))
    assert [s.name for s in suites.nearest(4, text, confused)] == ["dog", "bee", "cat", "fox"]


def test_suites_are_only_presets_of_their_folder() -> None:
    assert set(suites.names()) == set(config.preset_names("suites"))
    assert {"smoke", "bench", "quick", "standard", "full", "imagenette", "unlearncanvas", "i2p", "artists",
            "coco"} == set(suites.names())  # fmt: skip


# the slices that a suite of the built-in world owes
ERASED = {"seen", "held-out", "synonym", "crossed", "composed", "sealed"}
KEPT = {"neighbour", "unrelated", "style", "composed"}


@pytest.mark.parametrize("name", ["quick", "standard", "full"])
def test_the_suites_of_a_verdict_ask_in_every_slice(name: str) -> None:
    suite, world = suites.load(name)
    assert suite.neighbours == 8 and suite.identical
    target = world.find("church")
    near = [s for s in world.of_kind("object") if s is not target][: suite.neighbours]
    asked = probes.expand(suite, world, [target], near, sealed_by="x")
    slices = {probe.slice for probe in asked}
    assert slices == {f"erase/{one}" for one in ERASED} | {f"keep/{one}" for one in KEPT}
    shown = {label for p in asked if p.slice == "keep/neighbour" for label in p.labels("object")}
    assert shown == {subject.name for subject in near}, "every neighbour is asked for"
    assert all(len(p.labels("object")) == 2 for p in asked if p.slice.endswith("/composed"))
    crossed = Counter(p.labels("style") for p in asked if p.slice == "erase/crossed")
    assert len(crossed) >= 7 and not crossed.get(("photo",)), "the concept in the other styles"
    words = {*target.words[1:], *target.held_out}
    synonyms = [p.prompt for p in asked if p.slice == "erase/synonym"]
    assert words and all(any(word in prompt for word in words) for prompt in synonyms)


def test_every_kind_has_concepts_to_tune_on_and_concepts_to_test_on() -> None:
    _, world = suites.load("quick")
    for kind in ("object", "style"):
        shares = {world.share(subject.name) for subject in world.of_kind(kind)}
        assert shares >= {"dev", "test"}, kind


def test_neighbours_by_text_are_all_others_nearest_first(sd1: Base) -> None:
    _, world = suites.load("quick")
    church = world.find("church")
    found = suites.by_text(sd1, world, church)
    others = [s.name for s in world.of_kind("object") if s.name != "church"]
    assert sorted(s.name for s in found) == sorted(others)
    caption = world.templates[world.plain][0][0]
    captions = [probes.fill(caption, subject.words[0]) for subject in (church, *found)]
    states = [sd1.encode([text]).states.flatten().numpy() for text in captions]
    centred = np.stack(states) - np.mean(states, 0)
    cosines = centred[1:] @ centred[0] / np.linalg.norm(centred[1:], axis=1)
    assert (np.diff(cosines) < 1e-5).all()


def test_neighbours_by_confusion_are_what_the_judges_see_instead() -> None:
    _, world = suites.load("quick")

    def annotation(*ranked: str) -> Annotation:
        return Annotation({"object": (ranked,)}, {"object": ((0.6, 0.3, 0.1),)}, True)

    seen = [annotation("church", "castle", "house"), annotation("castle", "house", "church")]
    found = suites.by_confusion(seen, world, world.find("church"))
    assert [subject.name for subject in found] == ["castle", "house"]
