"""Attacked while it is made: the search, what joins the gate, the file that comes out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch
from command import conceptzap as run

import conceptzap
from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Erasure, Gate
from conceptzap.errors import UsageError
from conceptzap.redteam import case as cases
from conceptzap.redteam import finding, hardening, slips, spelling, standing_in
from conceptzap.redteam.case import AROUND, BEFORE, DERIVED, INSTEAD, SHIFTED, Budget, Case, Search
from conceptzap.report import Report
from conceptzap.runtime.attach import installed_on
from conceptzap.task import Task
from conceptzap.training import lessons, probe
from conceptzap.training.wordings import Pair
from conceptzap.trust import canary
from conceptzap.verbs import hardening as verb
from conceptzap.verbs import planning

TASK = Task(("van gogh",), ("painting",), ("monet", "cat"), ("style",))
SMALL = Budget(
    concept=4, others=8, wordings=2, styled=4, erased=2, turns=1, steps=2, searches=(Search(1), Search(2, 0.3, BEFORE)), batch=2, found=2,
    mixed=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few pictures, two looks, a base that recognises nothing, and no gate for wrong spelling."""
    monkeypatch.setattr(slips, "fit_gate", lambda *_: None)
    monkeypatch.setattr(cases.recognition, "rather", lambda base, clean, *_: -torch.ones(len(clean)))
    monkeypatch.setattr(probe, "LOOKED", 2)
    monkeypatch.setattr(probe, "FOLDS", 2)
    monkeypatch.setattr(hardening, "BUDGETS", {"quick": replace(SMALL, turns=0), "full": SMALL})
    yield


def recognised(monkeypatch: pytest.MonkeyPatch, found: float) -> None:
    """The base says of every picture that it is so far the concept."""
    monkeypatch.setattr(cases.recognition, "rather", lambda base, clean, *_: torch.full((len(clean),), found))


def test_a_gate_and_what_stands_in_for_the_text_join_the_edits(sd1: Base) -> None:
    edits = some.eraser(sd1)
    done = hardening.harden(sd1, TASK, edits, "full", Report())
    *old, beside, new = done.edits
    assert tuple(old) == edits and [gate.kind for gate in new.gates] == ["sight"]
    assert new.params == {"alone": True} and not beside.params
    anchor, concept = (standing_in._few(sd1, text) for text in ("a painting", "a painting by van gogh"))
    for edit, away in ((beside, 1.0), (new, standing_in.AWAY)):  # guidance leads away from the concept
        assert torch.allclose(edit.tensors["prompt"].float(), anchor, atol=1e-2)
        assert torch.allclose(edit.tensors["without"].float(), anchor + away * (concept - anchor), atol=1e-2)
    rounds = done.record["rounds"]["van gogh"]
    told = [rounds[name] for name in ("tokens", "place", "evades", "drawn", "through")]
    assert told == [[0, 1, 2], [INSTEAD, INSTEAD, BEFORE], [False, False, True], [0, 0, 0], [0, 0, 0]]
    assert done.record["budget"] == "full"
    again = hardening.harden(sd1, TASK, edits, "full", Report())
    assert [edit.name for edit in again.edits] == [edit.name for edit in done.edits]


def test_a_gate_that_opens_for_another_concept_gets_no_rows_of_one(sd1: Base) -> None:
    """They lead away from the concept, whatever the gate has opened for."""
    both = Task(concepts=("van gogh", "monet"), anchors=("painting", "painting"), kinds=("style", "style"))
    gate = some.gate(sd1)
    wide = replace(gate, params={**gate.params, "threshold": -9.0})
    edits = [replace(edit, gates=(wide,)) for edit in some.eraser(sd1)]
    for task, count in ((TASK, 1), (both, 0)):
        more = hardening.harden(sd1, task, edits, "quick", Report()).edits[len(edits) :]
        assert sum(edit.gates == (wide,) for edit in more) == count


@pytest.mark.parametrize(
    ("text", "few"), [("", [0, 1]), ("cat", [0, 1, 2]), ("a photo of a cat", [0, 4, 5, 6]), ("a " * 99, [0, 74, 75, 76])]
)
def test_few_states_say_what_a_text_ends_with(
    sd1: Base, text: str, few: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start, the last words, the end, and of the padding some at equal distances."""
    cond = sd1.encode([text])
    every = torch.arange(cond.states.shape[1]).half()
    numbered = replace(cond, states=every[None, :, None].expand_as(cond.states))
    monkeypatch.setattr(Base, "encode", lambda self, texts: numbered)
    rows = standing_in._few(sd1, text)
    places = rows[:, 0].int().tolist()
    assert len(places) == standing_in.ROWS and places[: len(few)] == few and places[-1] == 76
    steps = torch.tensor(places[len(few) - 1 :]).diff()
    assert steps.max() - steps.min() <= 1


def test_what_was_found_gets_a_probe_of_its_own_if_it_is_the_concept(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[list[int]] = []
    fit = probe.fit_gate
    monkeypatch.setattr(probe, "fit_gate", lambda c, *o: fitted.append([len(one) for one in c]) or fit(c, *o))
    for drawn in (False, True):
        recognised(monkeypatch, 0.5 if drawn else -0.5)
        hardening.harden(sd1, TASK, some.eraser(sd1), "full", Report())
    wrong = len(spelling.misspelt("van gogh"))
    start, two = [4, SMALL.mixed], SMALL.found
    assert fitted == [start, start, [*start, wrong], [*start, wrong + two], [*start, wrong + two, two]]


def test_what_is_too_little_for_a_probe_is_among_the_mixtures(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[list[int]] = []
    fit = probe.fit_gate
    monkeypatch.setattr(probe, "fit_gate", lambda c, *o: fitted.append([len(one) for one in c]) or fit(c, *o))
    monkeypatch.setattr(probe, "FOLDS", SMALL.found + 1)
    recognised(monkeypatch, 1.0)
    *_, edit = hardening.harden(sd1, TASK, some.eraser(sd1), "full", Report()).edits
    wrong, mixed, two = len(spelling.misspelt("van gogh")), SMALL.mixed, SMALL.found
    assert fitted[-2:] == [[4, mixed, wrong + two], [4, mixed + two, wrong + two, two]]
    assert edit.gates[0].tensors["query"].shape[1] == 3  # the concept's, of mixtures, of what does not evade


def test_what_a_search_finds_later_shares_its_probe(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "BUDGETS", {"full": replace(SMALL, turns=2)})
    monkeypatch.setattr(hardening, "_opened", lambda gate, seen, told: torch.zeros(len(seen), dtype=torch.bool))
    recognised(monkeypatch, 1.0)
    *_, edit = hardening.harden(sd1, TASK, some.eraser(sd1), "full", Report()).edits
    assert edit.gates[0].tensors["query"].shape[1] == 4  # the concept's, of mixtures, of what does not evade, of what does


def test_it_ends_when_every_search_in_turn_has_found_nothing(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not asked again, or do not apply, among them or not."""
    searches = (Search(1), Search(0, place=SHIFTED), Search(0, place=DERIVED), Search(2, 0.3, BEFORE))
    monkeypatch.setattr(hardening, "BUDGETS", {"full": replace(SMALL, turns=3, searches=searches)})
    monkeypatch.setattr(finding, "applies", lambda case, search: search.place != DERIVED)
    rounds = hardening.harden(sd1, TASK, some.eraser(sd1), "full", Report()).record["rounds"]["van gogh"]
    assert rounds["place"] == [INSTEAD, INSTEAD, SHIFTED, BEFORE]


@pytest.mark.parametrize("drawn", [True, False])
def test_tokens_that_were_found_join_the_text_gate(sd1: Base, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stand for the name in every prompt and draw the concept; rows and the other gate follow."""
    searches = (Search(1), Search(2, 0.3, BEFORE), Search(0, 0.1, AROUND), Search(0, place=SHIFTED))
    monkeypatch.setattr(cases, "GIVEN", ())
    monkeypatch.setattr(hardening, "BUDGETS", {"full": replace(SMALL, searches=searches)})
    plain = replace(some.gate(sd1), params={**some.gate(sd1).params, "threshold": 0.5})
    wrong, more = (replace(plain, params={**plain.params, "threshold": at}) for at in (0.4, 0.3))
    given: list[list[tuple[int, ...]]] = []

    def fitted(base: Base, lesson: Any, stay: Any, known: Gate, seed: int, found: Any = ()) -> Gate:
        given.append([tuple(one.at.shape) for one in found])
        assert len(stay) == (SMALL.styled if found else 0)  # of all things in styles, no more than are watched
        return more if found else wrong

    monkeypatch.setattr(slips, "fit_gate", fitted)
    recognised(monkeypatch, 1.0 if drawn else -1.0)
    edits = [replace(edit, gates=(plain,)) for edit in some.eraser(sd1)]
    *_, beside, last = hardening.harden(sd1, TASK, edits, "full", Report()).edits
    assert given == ([[], [(4,)]] if drawn else [[]])
    assert beside.gates == ((more if drawn else wrong),)
    assert last.gates[0].params["told"] == [plain.name, beside.gates[0].name]


def test_what_was_erased_is_all_that_the_texts_gate_opens_for(sd1: Base) -> None:
    """The prompts of the concept, and those of another that share its gate; a soft gate tells nothing."""
    lesson, edits = next(iter(lessons.lessons(sd1, TASK))), some.eraser(sd1)
    lesson = replace(lesson, pairs=tuple(Pair(prompt, "a painting") for prompt in some.ASKED))
    case, beside = Case(sd1, sd1, lesson, tuple(edits), SMALL, Report()), [some.ASKED[1], some.OTHER[1]]
    told = case.opened(some.ASKED[:2])
    assert [gate.name for gate in told] == [some.gate(sd1).name]
    known = hardening._watched(case, some.ASKED[:2], beside, told)
    assert known.gone == 3 and known.told == told
    assert known.gate.params["told"] == [some.gate(sd1).name]
    soft = replace(some.gate(sd1), kind="similar", params={"threshold": 1.0, "full": 1.1})
    vague = tuple(replace(edit, gates=(soft,)) for edit in edits)
    case = replace(case, edits=vague)
    known = hardening._watched(case, some.ASKED[:2], beside, case.opened(some.ASKED[:2]))
    assert known.gone == 2 and "told" not in known.gate.params


def test_what_opens_late_came_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen early, seen in the end only, never."""
    found = torch.tensor([[1.0, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, -1]])
    monkeypatch.setattr(probe, "looks", lambda *_: found)
    seen = probe.Seen(found[..., None], found[..., None], torch.arange(4), torch.zeros(4, 3))
    assert hardening._opened(None, seen, torch.zeros(3)).tolist() == [True, False, False]  # type: ignore[arg-type]


def test_the_base_says_what_was_drawn(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures as they ended, against the prompts that were asked and those of the anchor."""
    lesson, asked = next(iter(lessons.lessons(sd1, TASK))), []
    prompts = lesson.prompts[:2]
    found = probe.watch(sd1, prompts, 0, Report(), "looking", ends=True)
    monkeypatch.setattr(cases.recognition, "rather", lambda *given: asked.append(given) or torch.ones(2))
    case = Case(sd1, sd1, lesson, (), SMALL, Report())
    assert (case.likeness(prompts, found, 7) == 1).all()
    (_, ends, concept, anchor, seed), = asked
    assert ends.equal(found.ends) and seed == 7
    assert concept.states.equal(sd1.encode(prompts).states)
    assert anchor.states.equal(sd1.encode(lesson.anchors[:2]).states)


def opening(gate: Gate) -> Gate:
    """Open for whatever is drawn: a tiny random UNet tells nothing apart."""
    return replace(gate, params=gate.params | {"threshold": -100.0})


def every_gate_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = probe.fit_gate
    monkeypatch.setattr(probe, "fit_gate", lambda *given: opening(fit(*given)))


def recorded(base: Base) -> Erasure:
    """An erasure whose header says how it was made, and with it how it is hardened."""
    first = some.erasure(base)
    return replace(first, header=replace(first.header, made=({"method": "x"},)))


def test_a_file_is_hardened_into_another(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    every_gate_opens(monkeypatch)
    first = some.erasure(sd1)
    conceptzap.save(first, "vg")
    made = conceptzap.harden("vg", base=sd1, report=Report())
    assert made.path == Path(f"vg-hardened{format.SUFFIX}") and made.bytes == made.path.stat().st_size
    back = format.load(made.path)
    assert back.digest == made.digest and back.header.parents == (conceptzap.load("vg").digest,)
    more = [edit for edit in back.edits if edit not in first.edits]
    assert "sight" in {gate.kind for edit in more for gate in edit.gates}
    assert sorted(gate.kind for edit in more for gate in edit.gates) == ["match", "sight"]
    assert all("without" in edit.tensors for edit in more)
    assert set(back.header.base.fingerprint) == {"attn2", "text", "unet"}
    canary.check(sd1, back)
    shown = conceptzap.inspect(made.path)
    assert {gate["kind"] for gate in shown.gates.values()} == {"match", "sight"}
    for budget in ("quick", "full"):
        with pytest.raises(UsageError, match="hardened already"):
            conceptzap.harden(made.path, budget, sd1, report=Report())


def test_what_was_hardened_quickly_can_be_hardened_fully(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gate is learned anew: the same edits come of it as of what it was made of."""
    monkeypatch.chdir(tmp_path)
    every_gate_opens(monkeypatch)
    conceptzap.save(recorded(sd1), "vg")
    quick = conceptzap.harden("vg", "quick", sd1, output="quick", report=Report())
    assert len(quick.rounds["van gogh"]["n"]) == 1  # the name written wrongly, and no search
    with pytest.raises(UsageError, match="hardened already") as error:
        conceptzap.harden("quick", "quick", sd1, output="again", report=Report())
    assert "--budget full" in error.value.hint
    full = conceptzap.harden("quick", base=sd1, output="full", report=Report())
    straight = conceptzap.harden("vg", base=sd1, output="straight", report=Report())
    assert full.erasure.edits == straight.erasure.edits and full.rounds == straight.rounds
    assert full.erasure.header.canary == straight.erasure.header.canary
    assert full.erasure.header.parents[-1] == quick.digest
    assert {made["harden"]["budget"] for made in full.erasure.header.made} == {"full"}


def test_the_command_says_what_came_through_each_round(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "find_base", lambda *_: sd1)
    every_gate_opens(monkeypatch)
    recognised(monkeypatch, 1.0)
    monkeypatch.setattr(hardening, "_opened", lambda gate, seen, told: torch.arange(len(seen)) > 0)
    conceptzap.save(recorded(sd1), tmp_path / "vg")
    wrong, two = len(spelling.misspelt("van gogh")), SMALL.found
    told = run("harden", tmp_path / "vg", "-o", tmp_path / "text")
    assert told.code == 0 and f"van gogh: came through, round by round: 1 of {wrong}, 1 of {two}, 1 of {two}" in told.err
    assert told.out.strip() == str(tmp_path / f"text{format.SUFFIX}")
    assert re.search(r"harden +full *\n", run("inspect", tmp_path / "text").out)
    record = run("harden", tmp_path / "vg", "-o", tmp_path / "json", "--json").json
    assert record["rounds"]["van gogh"]["through"] == [1, 1, 1] and record["rounds"]["van gogh"]["n"] == [wrong, two, two]


def test_erase_hardens_what_it_makes(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ungated weights, too: they are attacked as they are, and the gate is beside them."""
    every_gate_opens(monkeypatch)
    made = conceptzap.erase(
        "van gogh", anchors="painting", kind="style", keep=["monet", "cat"], method="uce", base=sd1,
        harden="quick", preview=False, output=tmp_path / "vg", report=Report(),
    )  # fmt: skip
    acts = [(edit.op, [gate.kind for gate in edit.gates]) for edit in made.erasure.edits]
    assert ("weight", []) in acts and ("tokens", ["sight"]) in acts
    assert made.erasure.header.made[0]["harden"]["budget"] == "quick" and "hardening" in made.phases
    canary.check(sd1, format.load(made.path))


def test_what_erase_hardened_quickly_can_be_hardened_fully(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no spelling has a gate, what joined stood behind the edits' own, tested together with them."""
    every_gate_opens(monkeypatch)
    made = conceptzap.erase(
        "van gogh", anchors="painting", kind="style", keep=["monet", "cat"], method="zap", base=sd1, steps=1,
        overrides={"trajectories": 2}, harden="quick", preview=False, output=tmp_path / "vg", limit=0, report=Report(),
    )  # fmt: skip
    full = conceptzap.harden(made.path, "full", sd1, output=tmp_path / "full", report=Report()).erasure
    canary.check(sd1, format.load(tmp_path / f"full{format.SUFFIX}"))
    assert {name for test in full.header.canary.values() for name in test["edits"]} == {edit.name for edit in full.edits}


def test_an_erasure_made_weaker_is_hardened_as_it_is(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    every_gate_opens(monkeypatch)
    conceptzap.save(recorded(sd1).scaled(0.5), "half")
    quick = conceptzap.harden("half", "quick", sd1, output="quick", report=Report())
    full = conceptzap.harden(quick.erasure.scaled(0.5), base=sd1, output="full", report=Report())
    for made in (quick, full):
        canary.check(sd1, format.load(made.path))
        beside = [edit for edit in made.erasure.edits if "without" in edit.tensors and not edit.params]
        assert len(beside) == 1  # once behind a gate, at whatever strength


def test_it_is_hardened_beside_what_it_comes_after(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    monkeypatch.setattr(
        hardening, "harden", lambda base, task, edits, *_: held.append(len(installed_on(base.unet))) or hardening.Hardened(edits, {})
    )
    conceptzap.save(some.erasure(sd1, [some.shared(sd1)]), tmp_path / "before")
    conceptzap.erase(
        "van gogh", anchors="painting", kind="style", keep=["monet", "cat"], method="esd", steps=1, base=sd1,
        overrides={"trajectories": 2}, harden="quick", preview=False, output=tmp_path / "vg", limit=0,
        after=tmp_path / "before", report=Report(),
    )  # fmt: skip
    assert held == [1]


def test_a_list_keeps_what_was_hardened_as_much(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_gate_opens(monkeypatch)
    rows = [{"name": "van gogh", "anchor": "painting", "kind": "style", "keep": ["monet", "cat"], "method": "uce"}]
    for budget, kept in (("quick", False), ("quick", True), ("full", False), ("none", False)):
        done = conceptzap.erase_all(
            rows, harden=budget, base=sd1, limit=0, output=tmp_path / "all", force=True, report=Report()
        )
        assert [one.kept for one in done.files] == [kept]
    monkeypatch.setattr(hardening, "BUDGETS", {"quick": replace(SMALL, turns=0, erased=3)})
    conceptzap.erase_all(rows, harden="quick", base=sd1, limit=0, output=tmp_path / "all", force=True, report=Report())
    monkeypatch.setattr(hardening, "BUDGETS", {"quick": replace(SMALL, turns=0, erased=4)})
    done = conceptzap.erase_all(rows, harden="quick", base=sd1, limit=0, output=tmp_path / "all", force=True, report=Report())
    assert not done.files[0].kept  # by fewer pictures


def test_what_cannot_be_meant_is_said_before_anything_is_loaded(sd1: Base, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--budget much"):
        conceptzap.harden(some.erasure(sd1), "much")
    with pytest.raises(UsageError, match="--harden much"):
        conceptzap.plan("Van Gogh", harden="much")
    for asked, harden in (({}, "quick"), ({"method": "uce"}, None), ({"preset": "best"}, "full")):
        assert conceptzap.plan("Van Gogh", output=tmp_path / "x", **asked)["harden"] == harden
    for harden in ("quick", "full", "none"):
        told = conceptzap.plan("Van Gogh", harden=harden, output=tmp_path / "x")["harden"]
        assert told == (None if harden == "none" else harden)
    assert conceptzap.plan("Van Gogh", base="somebody/else", output=tmp_path / "x")["harden"] is None
    saved = planning.resolve("Van Gogh", harden="none", output=tmp_path / "x")
    assert saved.config()["harden"] == "none" and "--harden none" in saved.resume_command()
    assert "--harden" not in planning.resolve("Van Gogh", harden="quick", output=tmp_path / "x").resume_command()
    for preset, harden, said in (("best", "quick", True), ("best", "full", False), ("best", None, False)):
        command = planning.resolve("Van Gogh", preset=preset, harden=harden, output=tmp_path / "x").resume_command()
        assert ("--harden" in command) == said
    assert conceptzap.plan("Van Gogh", base=os.path.relpath(planning.DEMO_FOLDER), output=tmp_path / "x")["harden"] == "quick"
    listed = conceptzap.plan_all(["Van Gogh"], output=tmp_path / "y")
    assert [plan["harden"] for plan in listed["plans"]] == [None]
    key = some.erasure(sd1, [some.tokens(sd1, role="key")])
    with pytest.raises(UsageError, match="erases nothing"):
        conceptzap.harden(key, output=tmp_path / "x")


def test_the_task_of_a_file_is_the_one_it_was_made_for(sd1: Base) -> None:
    made = {"method": "x", "kinds": ["style"], "keep": ["monet", "zebra"]}
    header = replace(some.erasure(sd1).header, made=(made,))
    task = verb.task_of(sd1, header)
    assert task == Task(("van gogh",), ("painting",), ("monet",), ("style",))
    assert json.loads(json.dumps(task.kinds)) == ["style"]
    assert verb.task_of(sd1, replace(header, made=())).kinds == ("style",)
