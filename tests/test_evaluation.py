"""Suites, probes, cached cells, and `evaluate` and `compare` through the command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import stub_judges  # noqa: F401  (named on the command line)
from command import conceptzap, contents
from erasures import nudge, write

from conceptzap import cache, cells, config, evaluation, observing, probes, suites, verdict
from conceptzap.base import Base
from conceptzap.cells import Painter
from conceptzap.errors import ThresholdError, UsageError
from conceptzap.page.folder import _inert
from conceptzap.page.results import read
from conceptzap.result import Probe, Result, Score, Settings
from conceptzap.testing import save_tiny

CHEAP = ("--limit", 2, "--steps", 1, "--batch", 8)
WHOLE = 9  # batches of the cheap run: four slices, base and erased, and one of other seeds
STUB = ("--judge", "stub_judges:by_brightness")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def file(sd1: Base, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(sd1, "church", tmp_path_factory.mktemp("erasure"))


def evaluate(file: Path, folder: Path, out: Path, *more: object):
    words = ("evaluate", file, "--base", folder, "--suite", "imagenette", *STUB, *CHEAP, "-o", out)
    return conceptzap(*words, *more)


# -- probes ---------------------------------------------------------------------------------------


def test_every_suite_of_the_package_expands_to_what_it_says() -> None:
    for name in suites.names():
        suite, world = suites.load(name)
        target = world.subjects[0]
        asked = probes.expand(suite, world, [target], world.of_kind(target.kind)[1:4], sealed_by="x")
        counts = Counter(probe.slice.partition("/")[0] for probe in asked)
        assert counts["erase"] == sum(suite.erase.values()), name
        assert counts["keep"] == sum(suite.keep.values()), name
        assert len({(p.prompt, p.seed) for p in asked}) == len(asked), f"{name} repeats a cell"


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
    _, world = suites.load("smoke")
    assert world.find("kitty").name == "cat" and world.find("VAN GOGH").name == "Van Gogh"
    with pytest.raises(UsageError, match="no prompts for 'unicorn'"):
        suites.find(world, ["unicorn"])


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


# -- cells ----------------------------------------------------------------------------------------


def some(count: int, slice: str = "keep/unrelated") -> tuple[Probe, ...]:
    return tuple(Probe(slice, f"a cat {i}", i) for i in range(count))


def test_batches_are_drawn_once_and_read_back_bit_for_bit(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = Painter(sd1, Settings(steps=1, batch=2), nudge(sd1, "cat").edits, tmp_path)
    first = list(painter.batches(some(5)))
    assert [len(batch.probes) for batch in first] == [2, 2, 1] and painter.count(some(5)) == 3
    monkeypatch.setattr(cells, "drawings", lambda *_: pytest.fail("drawn again"))
    for kept, drawn in zip(painter.batches(some(5)), first, strict=True):
        assert np.array_equal(kept.pictures, drawn.pictures) and kept.fired == drawn.fired
        assert all(kept.fired)


def test_a_damaged_batch_is_drawn_again(sd1: Base, tmp_path: Path) -> None:
    painter = Painter(sd1, Settings(steps=1, batch=2), (), tmp_path)
    drawn = painter.batch(some(2))
    path = painter.path(some(2))
    path.write_bytes(path.read_bytes()[:-20])
    assert np.array_equal(painter.batch(some(2)).pictures, drawn.pictures)
    assert len(path.read_bytes()) > 20


def test_what_a_picture_depends_on_is_in_its_key(sd1: Base, tmp_path: Path) -> None:
    def path(settings: Settings, edits: tuple = (), asked: tuple[Probe, ...] = some(2)) -> Path:
        return Painter(sd1, settings, edits, tmp_path, "digest").path(asked)

    plain = Settings(steps=1, batch=2)
    edits = nudge(sd1, "cat").edits
    half = tuple(edit.scaled(0.5) for edit in edits)
    paths = [
        path(plain), path(Settings(steps=2, batch=2)), path(Settings(steps=1, batch=4)),
        path(plain, edits), path(plain, half), path(plain, asked=some(1)),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert path(plain, tuple(edit.scaled(0) for edit in edits)) == path(plain), "strength 0 is the base"
    assert path(plain, asked=some(2, "erase/seen")) == path(plain), "slices share pictures"


def test_identical_is_measured_one_by_one(sd1: Base, tmp_path: Path) -> None:
    settings = Settings(steps=1, batch=4)
    bare = Painter(sd1, settings, (), tmp_path)
    nudged = Painter(sd1, settings, nudge(sd1, "cat", 5.0).edits, tmp_path)
    assert observing.identical(bare, bare, some(4), 3) == (True, True, True)
    assert observing.identical(bare, nudged, some(4), 3) == (False, False, False)


# -- the command line -----------------------------------------------------------------------------


def test_evaluate_writes_result_report_cells_and_images(file: Path, folder: Path, tmp_path: Path) -> None:
    answer = evaluate(file, folder, tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["schema"] == "conceptzap.evaluate/1"
    result = read(Path(found["result"]))
    assert result.subject["concepts"] == {"church": ""} and result.settings["steps"] == 1
    assert result.score("E") and result.score("P") and result.score("validity")
    assert found["scores"]["E"]["n"] == 6
    lines = Path(found["cells"]).read_text().splitlines()
    assert len(lines) == 1 + 8, "a line for every cell and one for the names"
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 4


def test_a_result_survives_its_file(file: Path, folder: Path, tmp_path: Path) -> None:
    evaluate(file, folder, tmp_path / "out")
    path = tmp_path / "out" / "result.json"
    result = read(path)
    assert json.loads(json.dumps(result.record())) == json.loads(path.read_text())


def test_a_killed_run_goes_on_and_ends_the_same(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(file, folder, tmp_path / "whole").code == 0
    cache.clear()
    real, calls = cells.drawings, []

    def dying(*arguments: object):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "drawings", dying)
        assert evaluate(file, folder, tmp_path / "again").code == 130
    assert not (tmp_path / "again" / "result.json").exists()
    counted: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(cells, "drawings", lambda *a: counted.append(1) or real(*a))
        assert evaluate(file, folder, tmp_path / "again").code == 0
    assert 0 < len(counted) == WHOLE - 4, "the four batches of before were not drawn again"
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "whole").keys()
    for name in ("result.json", "report.html", "cells.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_cell_is_a_formula_for_a_spreadsheet(text: str) -> None:
    assert _inert(text) == f"'{text}"
    assert _inert("a = b") == "a = b" and _inert(-1) == -1


def test_nothing_is_overwritten_without_force(file: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate(file, folder, out).code == 0
    before = contents(out)
    answer = evaluate(file, folder, out)
    assert answer.code == 2 and "exists" in answer.error
    assert contents(out) == before
    assert evaluate(file, folder, out, "--force").code == 0


@pytest.mark.parametrize(
    "more, code, said",
    [
        (("--suite", "quikc"), 2, "quick"),
        (("--concept", "unicorn"), 2, "no prompts for 'unicorn'"),
        (("--fail-under", "E=most"), 2, "percentage"),
        (("--fail-under", "quality=90"), 2, "no such metric"),
        (("--limit", "0"), 2, "--limit"),
        (("--steps", "0"), 2, "--steps"),
        (("--steps", "-1"), 2, "--steps"),
        (("--seed", "-1"), 2, "--seed"),
        (("--guidance", "nan"), 2, "--guidance"),
    ],
)
def test_bad_requests_are_answered_before_any_picture(
    more: tuple[str, ...], code: int, said: str, file: Path, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cells, "drawings", lambda *_: pytest.fail("a picture was drawn"))
    answer = evaluate(file, folder, tmp_path / "out", *more)
    assert answer.code == code and said in answer.error
    assert not (tmp_path / "out").exists()


def test_a_threshold_that_is_not_met_is_exit_7_with_the_report_kept(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    answer = evaluate(file, folder, tmp_path / "out", "--fail-under", "E=95", "--fail-under", "P=1")
    assert answer.code == 7 and "under 95.0%" in answer.err
    assert (tmp_path / "out" / "report.html").exists()


def test_thresholds_are_held_against_the_lower_limit() -> None:
    def result(score: Score, failed: tuple = ()) -> Result:
        return Result({}, {}, "", {}, 0, [], "", (score,), failed)

    wanted = verdict.parse(["E=95"])
    verdict.enforce(result(Score("E", 0.99, 0.96, 1, 100)), wanted)
    with pytest.raises(ThresholdError, match="at least 94.0%"):
        verdict.enforce(result(Score("E", 0.99, 0.94, 1, 100)), wanted)
    with pytest.raises(ThresholdError, match="not measured"):
        verdict.enforce(result(Score("P", 1, 1, 1, 1)), wanted)
    with pytest.raises(ThresholdError, match="validity voids"):
        verdict.enforce(
            result(Score("E", 1, 1, 1, 100), ({"leg": "validity", "why": "noise"},)), wanted
        )


def test_compare_puts_results_side_by_side(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")  # names are not broken over lines
    for out, strength in (("a", ""), ("b", ":0.5")):
        evaluate(Path(f"{file}{strength}"), folder, tmp_path / out)
    paths = [tmp_path / out / "result.json" for out in "ab"]
    answer = conceptzap("compare", *paths)
    assert answer.code == 0 and "church.lprompt.safetensors:0.5" in answer.out.replace("\n", "")
    found = conceptzap("compare", *paths, "--json").json
    assert [one["path"] for one in found["results"]] == [str(path) for path in paths]


def test_compare_refuses_other_settings(file: Path, folder: Path, tmp_path: Path) -> None:
    evaluate(file, folder, tmp_path / "a")
    evaluate(file, folder, tmp_path / "b", "--guidance", "2")
    answer = conceptzap("compare", tmp_path / "a" / "result.json", tmp_path / "b" / "result.json")
    assert answer.code == 2 and "settings differ" in answer.error
    answer = conceptzap("compare", tmp_path / "none.json", tmp_path / "a" / "result.json")
    assert answer.code == 2 and "cannot read" in answer.error
    (tmp_path / "list.json").write_text("[1]")
    assert "not a result" in conceptzap("compare", tmp_path / "list.json").error


def test_suites_are_only_presets_of_their_folder() -> None:
    assert set(suites.names()) == set(config.preset_names("suites"))
    assert {"smoke", "quick", "standard", "full", "imagenette", "unlearncanvas", "i2p", "artists",
            "coco"} == set(suites.names())  # fmt: skip


def test_an_erasure_of_another_architecture_is_exit_4(
    sdxl: Base, folder: Path, tmp_path: Path
) -> None:
    answer = evaluate(write(sdxl, "church", tmp_path), folder, tmp_path / "out")
    assert answer.code == 4 and "was made for sdxl" in answer.error


def test_closing_has_nothing_to_say_on_a_base_without_judges(sd1: Base) -> None:
    from conceptzap.task import Task

    assert evaluation.closing(sd1, (), Task(("cat",)), Settings(steps=1, batch=8), 0) == {}


def test_a_model_that_never_knew_it_stands_beside_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conceptzap.judges import demo

    monkeypatch.setattr(demo, "ORACLE", tmp_path / "oracle.json")
    assert demo.oracle("quick", "church", "abc") == {}, "nothing measured, nothing said"
    known = {"base": "abc", "scores": {"quick/church": {"E": {"value": 0.99}}}}
    demo.ORACLE.write_text(json.dumps(known))
    assert demo.oracle("quick", "church", "abc") == {"E": {"value": 0.99}}
    assert demo.oracle("quick", "church", "another base") == {}
    assert demo.oracle("quick", "cat", "abc") == {}


def test_another_checkpoint_can_stand_in_for_an_erased_model(sd1: Base) -> None:
    from conceptzap.testing import tiny

    plan = evaluation.settle(
        sd1, "imagenette", ["church"], judges=["stub_judges:by_brightness"], steps=1, batch=8, limit=2
    )
    done = evaluation.evaluate_base(sd1, tiny("sd1", seed=1), plan)
    assert done.result.score("E") and not done.result.subject["files"]
    assert done.bare.digest != done.erased.digest
