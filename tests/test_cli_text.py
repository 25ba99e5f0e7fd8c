"""Whatever is typed, and whatever files say, is text: prompts, names, lists and spreadsheets."""

from __future__ import annotations

import csv
import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stub_judges  # noqa: F401  (named on the command line)
from command import conceptzap, contents
from erasures import nudge
from process import FRESH, Program
from test_cli_flow import closed_form

from conceptzap import format
from conceptzap.evaluation import suites
from conceptzap.judges import custom
from conceptzap.registry import config
from conceptzap.result import Settings
from conceptzap.testing import save_tiny, tiny

pytestmark = pytest.mark.usefixtures("few_steps", "loaded_once")
SUFFIX = ".lprompt.safetensors"
GOOD = f"good{SUFFIX}"
DRAW = ("--steps", "1", "--base", "base")
LARGE = "someone/some-base"  # whose vocabulary takes every word, and which a plan never opens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    save_tiny(folder / "base")
    format.save(nudge(tiny("sd1"), "church"), folder / GOOD)
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


# prompts


def test_a_prompt_that_is_too_long_says_what_is_left_out(here: Path) -> None:
    answer = conceptzap("generate", "cat " * 74 + "dog horse church", *DRAW, "-o", "long.png")
    assert answer.code == 0
    assert "warning: only 75 tokens are read, without: horse church\n" in answer.err


def test_the_empty_prompt_is_drawn_and_noted(here: Path) -> None:
    answer = conceptzap("generate", "", *DRAW, "-o", "empty.png")
    assert answer.code == 0 and answer.err.count("the empty prompt") == 1


def test_prompt_files_of_other_systems(here: Path) -> None:
    """A byte order mark and their line ends."""
    (here / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\na dog\r\n".encode())
    words = ("--prompts", "prompts.txt", *DRAW, "-o", "lists", "--json")
    images = conceptzap("generate", *words).json["images"]
    assert [image["prompt"] for image in images] == ["a cat", "a dog"]


def test_a_word_that_the_base_never_learned_is_warned_of(here: Path) -> None:
    answer = conceptzap("generate", "a catt, and a cat", *DRAW, "-o", "unknown.png")
    assert answer.code == 0
    assert re.findall("warning: .*", answer.err) == [
        "warning: base never learned 'catt'; did you mean cat or castle?"
    ]
    assert conceptzap("generate", "a catt", *DRAW, "-o", "unknown2.png", "-q").err == ""


def test_a_prompt_without_quotes_is_warned_of(here: Path) -> None:
    words = ("generate", "a", "cat", "church", *DRAW, "-o", "bare")
    assert 'warning: 3 prompts of one word each; for one, quote it: "a cat church"' in conceptzap(*words).err
    assert "one word" not in conceptzap("generate", "a cat", "church", *DRAW, "-o", "quoted").err


# concepts that may not be meant


@pytest.mark.parametrize(
    ("concepts", "doubt"),
    [
        (["Van", "Gogh"], 'for one, quote it: conceptzap erase "Van Gogh"'),
        (["Van Gohg"], "did you mean 'Van Gogh'?"),
        (["Van Gogh, Monet"], "is one concept; for several"),
        (["Van Gogh; Monet"], "is one concept; for several"),
        (["--", "-dogs"], "is taken as a concept, not as an option"),
        (["Van Gogh"], ""),
        (["church", "horse"], ""),
    ],
)
def test_what_is_seldom_meant_is_warned_of(concepts: list[str], doubt: str) -> None:
    answer = conceptzap("erase", "-n", "-o", "nowhere-else", "--base", LARGE, *concepts)
    assert answer.code == 0, answer
    assert (doubt in answer.err) if doubt else (answer.err == "")
    assert answer.err.count("warning: ") == bool(doubt)


@pytest.mark.parametrize(("concept", "near"), [("Van Gohg", "Van Gogh?"), ("a catt", "cat"), ("a zebra", "")])
def test_what_the_demo_has_no_word_for_is_no_doubt_but_an_error(concept: str, near: str) -> None:
    answer = conceptzap("erase", "-n", concept)
    assert answer.code == 2 and f"demo does not know {concept!r}" in answer.error
    assert (f"did you mean {near}" if near else "; what it knows: conceptzap demo --words") in answer.error


# names


@pytest.mark.parametrize("text", ["../../cat", "/etc/cat", "~/cat", "cat\0", "..", "a/../../cat"])
def test_no_name_leads_out_of_the_folder(
    text: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are called after what was asked for, in letters, digits and hyphens."""
    inside = tmp_path / "outer" / "inner"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    drawn = conceptzap("generate", text, "--steps", "1", "--base", here / "base", "--json")
    (image,) = drawn.json["images"]
    assert Path(image["path"]).parent == inside / "images"
    made = {path for path in contents(tmp_path) if path.endswith(".png")}
    assert made == {f"outer/inner/images/{Path(image['path']).name}"}
    if any(map(str.isalnum, text)):
        planned = conceptzap("erase", text, "--base", LARGE, "--dry-run", "--json").json
        assert Path(planned["output"]).parent == inside


@pytest.mark.parametrize("name", [b"two words", b"two\nlines", b"no utf8 \xff", "église".encode()])
def test_any_name_without_home_locale_or_terminal(name: bytes, here: Path, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), name + SUFFIX.encode())
    shutil.copyfile(GOOD, path)
    done = subprocess.run(
        [sys.executable, "-m", "conceptzap", "inspect", path],
        env={"PYTHONPATH": os.environ["PYTHONPATH"], "LC_ALL": "C", "PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"church" in done.stdout and done.stderr == b""


def test_without_a_network_a_hub_name_is_one_line(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is not told to stay offline: it finds no way out."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    done = Program(FRESH, "generate", "a cat", "--base", "nobody/nothing", cwd=tmp_path)
    assert done.wait() == 5 and done.out == ""
    # a slow machine hears of the work in between
    said = [line for line in done.err.splitlines() if not line.startswith("[")]
    assert len(said) == 1 and "the hub cannot be reached" in said[0]
    assert not contents(tmp_path)


# spreadsheets


def test_no_written_cell_is_a_formula(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite whose prompts begin with what a spreadsheet would run."""
    real = config.preset
    signs = "=+-@"

    def suite(name: str, folder: str = "") -> dict:
        table = real(name, folder)
        if folder == "suites":
            seen, held_out = ([f"{sign}{{a}}" for sign in two] for two in ("=+", "-@"))
            table["world"] |= {"seen": seen, "held_out": held_out}
            table["repeats"] = 1
        return table

    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(config, "preset", suite)
    words = ("--suite", "imagenette", "--judge", "stub_judges:by_brightness", "--limit", "8", "--fail-under", "E=0")
    answer = conceptzap("evaluate", GOOD, *words, *DRAW, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    with open(tmp_path / "out" / "cells.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    prompts = {row[rows[0].index("prompt")] for row in rows[1:]}
    assert {prompt[:2] for prompt in prompts} == {f"'{sign}" for sign in signs}
    assert not [cell for row in rows for cell in row if cell.startswith(tuple(f"{signs}\t\r"))]


# concepts that a base cannot draw


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny base comes with judges of the built-in world, who see nothing in its noise of one step."""
    from conceptzap.judges import demo

    suite, built_in = suites.load("smoke")  # what `erase` ends with has its own number of steps
    monkeypatch.setattr(suites, "load", lambda name: (replace(suite, steps=1), built_in))
    judges = functools.partial(custom.load, option="stub_judges:nothing", world=demo.world())
    monkeypatch.setattr(demo, "fits", lambda base: True)
    monkeypatch.setattr(demo, "load", judges)
    monkeypatch.setattr("conceptzap.verbs.erasing.usual", lambda base: Settings(steps=1, guidance=1.0))
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path / "cache"))


def erased(concept: str, folder: Path, *more: str) -> str:
    words = ("--base", "base", "--method", closed_form(), "-o", folder / "new", *more)
    answer = conceptzap("erase", concept, *words)
    assert answer.code == 0 and (folder / f"new{SUFFIX}").is_file(), answer
    return answer.err


def test_a_concept_that_the_base_hardly_draws_is_warned_of(
    judged: None, here: Path, tmp_path: Path
) -> None:
    """Without a leak there, too, but that is not what a leak of nought stands for elsewhere."""
    told = erased("cat", tmp_path)
    assert "warning: base itself shows 'cat' in 0 of 24 pictures" in told
    assert told.count("warning: ") == 1


def test_a_concept_that_no_judge_knows_is_warned_of(judged: None, here: Path, tmp_path: Path) -> None:
    assert "warning: no classifier knows 'kitty', so" not in erased("kitty", tmp_path)
    assert "warning: no classifier knows 'oil', so" in erased("oil", tmp_path, "--force")
