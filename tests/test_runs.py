"""`--run-dir`, `--patience` and the presets for a quick or a thorough erasing, through the command line."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from command import conceptzap, contents

from conceptzap.format import naming
from conceptzap.testing import save_tiny

TRAINED = ("--method", "esd", "--set", "trajectories=2", "--set", "batch=1")
FILE = "cat.lprompt.safetensors"

pytestmark = pytest.mark.usefixtures("few_steps", "loaded_once")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "base")
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def test_all_of_a_run_is_in_its_folder(here: Path) -> None:
    words = ("erase", "cat", "--anchor", "dog", "--keep", "horse", "--base", "base", "--steps", "3")
    more = ("--run-dir", "runs", "--sample-every", "2", "--no-preview", "--json")
    answer = conceptzap(*words, *TRAINED, *more)
    assert answer.code == 0, answer
    (folder,) = (here / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-cat", folder.name) and answer.json["path"] == str(folder / FILE)
    names = {"config.toml", "log.txt", "metrics.jsonl", "samples", "result.json", FILE}
    assert {path.name for path in folder.iterdir()} == names
    result = json.loads((folder / "result.json").read_text())
    assert result["digest"] == answer.json["digest"] and "learning" in result["phases"]
    said = (folder / "log.txt").read_text()
    assert "loading base" in said and re.match(r" +\d+\.\d s  ", said)
    assert tomllib.loads((folder / "config.toml").read_text())["set"]["steps"] == 3
    # what is kept there makes the same file again
    again = conceptzap("erase", "--config", folder / "config.toml", "-o", "again", "--no-preview", "--json")
    assert again.json["digest"] == answer.json["digest"]
    # and the folder of a run is named to take it up, or to make it anew
    taken = conceptzap(*words, *TRAINED, "--run-dir", folder)
    assert taken.code == 2 and f"{FILE} exists" in taken.error


def test_a_run_s_folder_is_its_own(here: Path) -> None:
    before = contents(here)
    words = ("erase", "cat", "--base", "base", "--run-dir", "other/runs")
    assert conceptzap(*words, "-o", "cat").code == 2
    assert re.search(r"other/runs/\d+-\d+-cat/", conceptzap(*words, "-n", "--json").json["output"])
    assert contents(here) == before
    (here / "taken").write_text("a file")
    assert conceptzap("erase", "cat", "--base", "base", "--run-dir", "taken", "-n").code == 2


def test_a_run_is_named_by_its_time_and_concepts() -> None:
    first = naming.run_folder("runs", ["Van Gogh", "church"])
    assert re.fullmatch(r"\d{8}-\d{6}-van-gogh-church", first.name)
    assert naming.run_folder(first, ["anything"]) == first


def test_a_config_file_says_where_to(here: Path) -> None:
    (here / "there.toml").write_text('concepts = "cat"\nbase = "base"\noutput = "~/there"\nlog_with = "jsonl"\n')
    (here / "runs.toml").write_text('concepts = "cat"\nbase = "base"\nrun_dir = "more"\nsample_every = 2\n')

    def planned(*words: str) -> str:
        return conceptzap("erase", "--config", *words, "-n", "--json").json["output"]

    assert planned("there.toml") == str(Path.home() / "there.lprompt.safetensors")
    assert re.search(r"/more/\d+-\d+-cat/", planned("runs.toml"))
    # what the command line says is instead of whichever the file says
    assert planned("runs.toml", "-o", "here") == str(here / "here.lprompt.safetensors")
    assert "/less/" in planned("there.toml", "--run-dir", "less")
    (here / "both.toml").write_text('concepts = "cat"\nbase = "base"\nrun_dir = 3\n')
    assert "both.toml:3: run_dir = 3 is not a text" in conceptzap("erase", "--config", "both.toml", "-n").error


def test_a_plan_says_what_the_last_run_took(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path))
    words = ("erase", "dog", "--anchor", "cat", "--base", "base", "--method", "uce", "--no-preview")
    assert conceptzap(*words, "-n", "--json").json["estimate"] is None
    assert "not known before a first uce on this base" in conceptzap(*words, "-n").out
    made = conceptzap(*words, "-o", "costs", "--json").json
    estimate = conceptzap(*words, "-n", "--json").json["estimate"]
    assert estimate.pop("same") and estimate.pop("peak_bytes") > 0
    assert estimate == {name: made[name] for name in ("seconds", "bytes")}
    # of other words it is the same, of other settings it is what is nearest; of another method nothing
    assert conceptzap("erase", "tree", *words[2:], "-n", "--json").json["estimate"]["same"]
    assert not conceptzap(*words, "--set", "rank=2", "-n", "--json").json["estimate"]["same"]
    told = " ".join(conceptzap(*words, "--set", "rank=2", "-n").out.split())  # however a terminal wraps it
    assert "as the last run with other settings here" in told
    assert conceptzap("erase", "dog", "--base", "base", "-n", "--json").json["estimate"] is None
    for path in (tmp_path / "costs").iterdir():
        path.write_text("{}")
    assert conceptzap(*words, "-n", "--json").json["estimate"] is None


def test_it_says_why_it_ended(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptzap.training.patience.Way.gone", lambda self, edits: 0.9)
    words = ("erase", "dog", "--anchor", "cat", "--keep", "horse", "--base", "base", "--no-preview", *TRAINED)
    answer = conceptzap(*words, "--steps", "9", "--patience", "2")
    assert answer.code == 0, answer
    assert "learning ended at step 3 of 9: 2 checks in a row brought nothing more" in answer.err
    info = conceptzap("inspect", "dog", "--json").json["files"][0]
    assert info["made"][0]["patience"] == 2
    assert conceptzap(*words, "--patience", "0", "--force").code == 2


def test_fast_and_best() -> None:
    from conceptzap import api

    quick, best, usual = (api.plan("church", preset=name) for name in ("fast", "best", None))
    assert "steps" not in quick["config"] and quick["harden"] is None
    assert best["harden"] == "full" and usual["harden"] == "quick" and best["method"] == usual["method"]
    # what stays, and what a concept becomes, is still guessed from the words
    assert quick["anchors"] == best["anchors"] == usual["anchors"] and quick["kinds"] == usual["kinds"]
    assert api.plan("church", preset="best", harden="quick")["harden"] == "quick"
