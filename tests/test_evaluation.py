"""`evaluate` and `compare` through the command line, and how `erase` measures itself."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command import conceptzap, contents
from erasures import write
from evaluations import ANY, CHEAP, STUB, evaluate
from process import Program
from test_cli_flow import closed_form

from conceptzap import api
from conceptzap.base import Base
from conceptzap.errors import ThresholdError
from conceptzap.evaluation import cached, run, suites, verdict
from conceptzap.evaluation.closing import closing
from conceptzap.evaluation.phrases import FIRST, NAMES
from conceptzap.page import report
from conceptzap.page.folder import _inert
from conceptzap.result import Result, Score, Settings
from conceptzap.verbs.evaluating import read, settle

WHOLE = 13  # batches of the cheap run: four slices, base and erased, one of other seeds, four strengths
ATTENDED = report._attended


@pytest.fixture(scope="module", autouse=True)
def shared(loaded_once: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one test drew is there for the next; a page shows no attention where no test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCEPTZAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(report, "_attended", lambda *_: ())
        yield


@pytest.fixture(scope="module")
def whole(shared: None, church: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cheap run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(church, tiny_folder, out).code == 0
    return out


def test_evaluate_writes_result_report_cells_and_images(
    church: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    answer = evaluate(church, tiny_folder, tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["schema"] == "conceptzap.evaluate/1"
    result = read(Path(found["result"]))
    assert result.subject["concepts"] == {"church": ""} and result.settings["steps"] == 1
    assert result.score("E") and result.score("P") and result.score("validity")
    assert found["scores"]["E"]["n"] == 6
    lines = Path(found["cells"]).read_text().splitlines()
    assert len(lines) == 1 + 8, "a line for every sample and one for the names"
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 4


def test_the_scores_are_a_table_with_the_legs_of_every_mean(
    church: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    answer = evaluate(church, tiny_folder, tmp_path / "out")
    first, *rows = [line.strip() for line in answer.out.splitlines() if line.strip()]
    gone, asked = read(tmp_path / "out" / "result.json").counts["gone"]
    assert first.startswith(f"church is gone from {gone} of {asked} pictures")
    names = [NAMES.get(metric, metric) for metric in FIRST[:9]]
    assert [name for row in rows for name in names if row.startswith(name)] == names
    assert "ESR-1" not in answer.out and "-v" in answer.err, "the benchmarks' metrics are for who asks"
    assert "95 %" in answer.out and str(tmp_path / "out" / "report.html") in answer.err
    quiet = evaluate(church, tiny_folder, tmp_path / "quiet", "--quiet")
    assert (quiet.out, quiet.err) == (f"{tmp_path / 'quiet' / 'result.json'}\n", "")


def test_files_are_evaluated_together_under_their_strengths(
    sd1: Base, church: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = write(sd1, "tench", tmp_path)
    answer = evaluate(church, tiny_folder, Path("both"), f"{other}:0.5")
    assert answer.code == 0, answer.err
    result = read(Path("both/result.json"))
    assert list(result.subject["concepts"]) == ["church", "tench"]
    assert [file["strength"] for file in result.subject["files"]] == [1.0, 0.5]
    assert result.score("E", "concept/church") and result.score("E", "concept/tench")


def test_what_must_be_gone_can_be_said(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert evaluate(church, tiny_folder, tmp_path / "out", "--concept", "parachute").code == 0
    assert list(read(tmp_path / "out" / "result.json").subject["concepts"]) == ["parachute"]


def test_the_folder_is_named_after_file_and_suite(
    church: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("evaluate", church, "--base", tiny_folder, "--suite", "imagenette", *STUB, *CHEAP, *ANY)
    assert conceptzap(*words).code == 0
    found = {path.name for path in Path("church-imagenette").iterdir()}
    assert found == {"result.json", "report.html", "cells.csv", "images"}


def test_a_result_survives_its_file(whole: Path) -> None:
    path = whole / "result.json"
    result = read(path)
    assert json.loads(json.dumps(result.record())) == json.loads(path.read_text())


def test_an_interrupted_run_draws_only_what_is_missing(
    own_cache: Path, church: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, drawn = cached.drawings, []

    def dying(*arguments: object):
        drawn.append(arguments)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cached, "drawings", dying)
        assert evaluate(church, tiny_folder, tmp_path / "out").code == 130
    assert not (tmp_path / "out" / "result.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(cached, "drawings", lambda *a: drawn.append(a) or real(*a))
        assert evaluate(church, tiny_folder, tmp_path / "out").code == 0
    assert len(drawn) - 5 == WHOLE - 4, "the four batches of before were not drawn again"


def test_the_bases_pictures_are_shared_between_runs(
    own_cache: Path, church: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(church, tiny_folder, tmp_path / "one")
    real, drawn = cached.drawings, []

    def counting(base: Base, prompts: object, seeds: object, settings: Settings, edits: tuple):
        drawn.append(edits)
        return real(base, prompts, seeds, settings, edits)

    monkeypatch.setattr(cached, "drawings", counting)
    evaluate(Path(f"{church}:0.5"), tiny_folder, tmp_path / "half")
    assert len(drawn) == 5 and all(drawn), "four slices and a strength under other edits, none of the base"


def test_a_run_that_was_shot_goes_on_and_ends_byte_for_byte_the_same(
    own_cache: Path, church: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_attended", ATTENDED)
    words = ["evaluate", church, "--base", tiny_folder, "--suite", "smoke"]
    words += ["--limit", 2, "--steps", 1, "--batch", 2]
    store = tmp_path / "shot-cache"
    running = Program("", *words, "-o", tmp_path / "shot", CONCEPTZAP_CACHE=str(store))
    while len(kept := dict(_pictures(store))) < 4 and running.running:
        time.sleep(0.05)
    assert running.kill() == -signal.SIGKILL, "it was over before it could be shot"
    assert not (tmp_path / "shot").exists()
    with monkeypatch.context() as patch:
        patch.setenv("CONCEPTZAP_CACHE", str(store))
        assert conceptzap(*words, "-o", tmp_path / "shot").code == 0
    after = dict(_pictures(store))
    assert all(after[path] == time for path, time in kept.items()) and len(after) > len(kept)

    assert conceptzap(*words, "-o", tmp_path / "whole").code == 0
    shot, whole = (
        {name: data for name, (_, data) in contents(tmp_path / one).items()} for one in ("shot", "whole")
    )
    assert {"result.json", "cells.csv", "report.html", "images/erase-seen.png"} <= whole.keys()
    assert shot == whole


def _pictures(store: Path) -> list[tuple[Path, int]]:
    """The finished batches in a cache, with their times of change."""
    return [(path, path.stat().st_mtime_ns) for path in store.rglob("*.png")]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_cell_is_a_formula_for_a_spreadsheet(text: str) -> None:
    assert _inert(text) == f"'{text}"
    assert _inert("a = b") == "a = b" and _inert(-1) == -1


def test_nothing_is_overwritten_without_force(
    church: Path, tiny_folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = contents(out)
    answer = evaluate(church, tiny_folder, out)
    assert answer.code == 2 and "exists" in answer.error
    assert contents(out) == before
    assert evaluate(church, tiny_folder, out, "--force").code == 0


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
    more: tuple[str, ...], code: int, said: str, church: Path, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cached, "drawings", lambda *_: pytest.fail("a picture was drawn"))
    answer = evaluate(church, tiny_folder, tmp_path / "out", *more)
    assert answer.code == code and said in answer.error
    assert not (tmp_path / "out").exists()


def test_a_threshold_that_is_not_met_is_exit_7_with_the_report_kept(
    church: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    answer = evaluate(church, tiny_folder, tmp_path / "out", "--fail-under", "E=95", "--fail-under", "P=1")
    assert answer.code == 7 and "E is" in answer.err and "under 95.0%" in answer.err
    assert NAMES["seen before"] in answer.out, "the scores are shown all the same"
    assert (tmp_path / "out" / "report.html").exists()
    again = evaluate(church, tiny_folder, tmp_path / "out", "--force", "--fail-under", "E=95", "--json")
    assert again.code == 7 and again.json["error"]["kind"] == "ThresholdError"
    assert str(tmp_path / "out" / "report.html") in again.json["error"]["hint"]


def test_thresholds_that_are_met_are_exit_0(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    met = evaluate(church, tiny_folder, tmp_path / "out", "--fail-under", "E=0", "--fail-under", "P=0")
    assert met.code == 0, met.err


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


def test_a_concept_that_is_still_drawn_is_exit_7(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The base shows a church in half of its pictures (to the stub), the erased model no less."""
    words = ("evaluate", church, "--base", tiny_folder, "--suite", "imagenette", *STUB, *CHEAP)
    answer = conceptzap(*words, "-o", tmp_path / "out")
    assert answer.code == 7 and "not erased: church is gone from 3 of 6" in answer.err
    assert answer.out.startswith("church is gone from 3 of 6 pictures")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<title>Church: not erased" in page and "<h1>Church: not erased" in page


def test_an_erasure_named_twice_is_attached_once(
    own_cache: Path, church: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, under = cached.drawings, []
    monkeypatch.setattr(cached, "drawings", lambda *a: under.append(a[4]) or real(*a))
    assert evaluate(church, tiny_folder, tmp_path / "once").code == 0
    drawn = len(under)
    assert evaluate(church, tiny_folder, tmp_path / "twice", church).code == 0
    assert len(under) == drawn, "the very pictures of the one"
    twice, once = (read(tmp_path / name / "result.json") for name in ("twice", "once"))
    assert twice == once and len(twice.subject["files"]) == 1
    other = evaluate(church, tiny_folder, tmp_path / "half", f"{church}:0.5")
    assert other.code == 2 and "at the strengths 1 and 0.5" in other.error


def test_so_few_pictures_could_not_show_it(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def result(n: int, low: float) -> Result:
        return Result({}, {}, "", {}, 0, [], "", (Score("E", 1.0, low, 1.0, n),))

    with pytest.raises(ThresholdError, match="60 pictures cannot show E 95 %; use --suite standard"):
        verdict.enforce(result(60, 0.94), {"E": 0.95})
    verdict.enforce(result(260, 0.985), {"E": 0.95})
    answer = evaluate(church, tiny_folder, tmp_path / "out", "--fail-under", "E=95")
    assert answer.code == 7 and "6 pictures cannot show E 95 %" in answer.err.partition("drawing")[0]


def test_compare_puts_results_side_by_side(
    church: Path, tiny_folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")  # names are not broken over lines
    evaluate(Path(f"{church}:0.5"), tiny_folder, tmp_path / "half")
    paths = [out / "result.json" for out in (whole, tmp_path / "half")]
    answer = conceptzap("compare", *paths)
    assert answer.code == 0 and "church.lprompt.safetensors:0.5" in answer.out.replace("\n", "")
    found = conceptzap("compare", *paths, "--json").json
    assert [one["path"] for one in found["results"]] == [str(path) for path in paths]


def test_results_of_one_file_are_told_apart_by_folder(
    church: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for out in ("a", "b"):
        shutil.copytree(whole, tmp_path / out)
    found = conceptzap("compare", tmp_path / "a", tmp_path / "b" / "result.json", "--json").json
    assert [one["name"] for one in found["results"]] == [f"{out}: {church.name}" for out in "ab"]
    assert "a: church" in conceptzap("compare", tmp_path / "a", tmp_path / "b").out


def test_from_python_it_measures_and_raises_only_when_asked(
    church: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    request = {
        "base": str(tiny_folder), "suite": "imagenette", "judges": "stub_judges:by_brightness",
        "limit": 2, "steps": 1, "batch": 8,
    }  # fmt: skip
    done = api.evaluate(church, **request)
    assert done.result.score("E") and done.written == {}
    with pytest.raises(ThresholdError, match="not erased") as caught:
        api.evaluate([(church, 1.0)], **request, fail_under=[], output=tmp_path / "out")
    written = caught.value.made.written
    assert read(written["folder"]) == done.result and written["report"].is_file()
    assert api.compare([written["folder"]]) == {church.name: done.result}


def test_compare_refuses_other_settings(church: Path, tiny_folder: Path, whole: Path, tmp_path: Path) -> None:
    evaluate(church, tiny_folder, tmp_path / "b", "--guidance", "2")
    answer = conceptzap("compare", whole / "result.json", tmp_path / "b" / "result.json")
    assert answer.code == 2 and "settings differ" in answer.error
    answer = conceptzap("compare", tmp_path / "none.json", whole / "result.json")
    assert answer.code == 2 and "cannot read" in answer.error
    (tmp_path / "list.json").write_text("[1]")
    assert "not a result" in conceptzap("compare", tmp_path / "list.json").error


def test_an_erasure_of_another_architecture_is_exit_4(
    sdxl: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    answer = evaluate(write(sdxl, "church", tmp_path), tiny_folder, tmp_path / "out")
    assert answer.code == 4 and "was made for tiny-sdxl (sdxl)" in answer.error


def test_erase_ends_with_the_smoke_suite(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in judges look at the tiny base's pictures: they see nothing, but every one of them."""
    from conceptzap.judges import demo

    monkeypatch.setattr(demo, "fits", lambda base: True)
    suite, world = suites.load("smoke")
    few = {"erase": dict.fromkeys(suite.erase, 2), "keep": dict.fromkeys(suite.keep, 4)}
    suite = replace(suite, steps=1, **few)
    monkeypatch.setattr(suites, "load", lambda *_: (suite, world))
    words = ("erase", "church", "--anchor", "house", "--base", tiny_folder, "--method", closed_form())
    answer = conceptzap(*words, "--set", "keep_prompts=12", "-o", tmp_path / "church", "--json")
    assert answer.code == 0, answer.err
    scores = answer.json["scores"]
    assert scores["leak"]["n"] == sum(suite.erase.values())
    asked = 2 * suite.keep["unrelated"] + 2 * suite.keep["style"]  # an object and a style each
    assert scores["preservation"]["n"] == asked
    (told,) = conceptzap("inspect", answer.json["path"], "--json").json["files"]
    assert told["scores"]["leak"]["n"] == scores["leak"]["n"], "they travel with the file"


def test_closing_has_nothing_to_say_on_a_base_without_judges(sd1: Base) -> None:
    from conceptzap.task import Task

    assert not closing(sd1, (), Task(("cat",)), Settings(steps=1, batch=8), 0).scores


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

    experiment = settle(
        sd1, "imagenette", ["church"], judges=["stub_judges:by_brightness"], steps=1, batch=8, limit=2
    )
    done = run.evaluate_base(sd1, tiny("sd1", seed=1), experiment)
    assert done.result.score("E") and not done.result.subject["files"]
    assert done.bare.digest != done.erased.digest
