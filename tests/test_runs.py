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

pytestmark = pytest.mark.usefixtures("few_steps")


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
    assert best["harden"] == "quick" and best["method"] == usual["method"]
    # what stays, and what a concept becomes, is still guessed from the words
    assert quick["anchors"] == best["anchors"] == usual["anchors"] and quick["kinds"] == usual["kinds"]
    assert api.plan("church", preset="best", harden="full")["harden"] == "full"
