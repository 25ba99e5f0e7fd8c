"""Files named as people name them: without their endings, from home, and as the stack of others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command import conceptzap, contents
from erasures import nudge
from samples import header, rich, small

import conceptzap as package
from conceptzap import format
from conceptzap.errors import UsageError
from conceptzap.format.pictures import read_text
from conceptzap.testing import save_tiny, tiny

SUFFIX = ".lprompt.safetensors"
pytestmark = pytest.mark.usefixtures("loaded_once")
DRAW = ("--steps", "1", "--base", "base")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    save_tiny(folder / "base")
    format.save(nudge(tiny("sd1"), "church"), folder / f"church{SUFFIX}")
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three erasures, `a` and `b` made by hand, and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    format.save(replace(rich(), header=header(title="Van Gogh")), tmp_path / f"a{SUFFIX}")
    format.save(replace(small(), header=header(title="church")), tmp_path / f"b{SUFFIX}")
    shutil.copyfile(world / f"church{SUFFIX}", tmp_path / f"church{SUFFIX}")
    (tmp_path / "base").symlink_to(world / "base")
    return tmp_path


# stack


def test_stack_as_the_order_writes_it(here: Path) -> None:
    answer = conceptzap("stack", "a.lprompt", "b.lprompt")
    target = here / f"van-gogh+church{SUFFIX}"
    assert (answer.code, answer.out) == (0, f"{target}\n"), answer.err
    assert len(format.read_header(target).header.parents) == 2


def test_a_stack_has_one_name_whatever_the_order_and_overwrites_nothing(here: Path) -> None:
    made = conceptzap("stack", "a", "b", "--json").json
    before = contents(here)
    again = conceptzap("stack", "b", f"a{SUFFIX}")
    assert again.code == 2 and f"van-gogh+church{SUFFIX} exists" in again.error
    assert contents(here) == before
    assert conceptzap("stack", "b", "a", "--force", "--json").json == made


# every command


@pytest.mark.parametrize("name", ["church", "church.lprompt", f"church{SUFFIX}", "./church"])
def test_a_file_is_found_by_every_command(name: str, here: Path) -> None:
    full = str(here / f"church{SUFFIX}")
    assert conceptzap("inspect", name, "--json").json["files"][0]["path"] == full
    for given in (name, f"{name}:0.5"):
        words = ("a church", "--with", given, *DRAW, "--json", "-o", "drawn.png", "--force")
        (image,) = conceptzap("generate", *words).json["images"]
        assert image["erasures"][0]["path"] == full
    pinned = conceptzap("lock", name, "--base", "base", "--json", "--force").json
    assert pinned["files"][0]["path"] == f"church{SUFFIX}"
    refused = conceptzap("export", name, "--to", "lora", "-o", "lora", "--base", "base")
    assert refused.code != 3 and "no such file" not in refused.err


def test_a_file_is_found_from_python(here: Path) -> None:
    erasure = package.load("a")
    assert package.inspect("a.lprompt").path == Path(f"a{SUFFIX}")
    assert package.stack(["a", "b"]).digest == package.stack([erasure, Path("b")]).digest
    assert package.save(erasure, "half") == package.load("half").digest
    assert (here / f"half{SUFFIX}").is_file()
    with pytest.raises(UsageError, match="exists"):
        package.save(erasure, "half")


def test_a_name_that_is_near_is_proposed_without_its_ending(here: Path) -> None:
    (here / "church.png").touch()
    for name in ("chruch", "chruch.lprompt", f"chruch{SUFFIX}"):
        assert f"did you mean church{SUFFIX}" in conceptzap("inspect", name).error


# home


def test_home_is_expanded_wherever_a_file_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "words.txt").write_text("a church\n")
    words = ("--with=~/church:0.5", "--prompts=~/words.txt", "-o~/home.png", "--base=~/base")
    drawn = conceptzap("generate", *words, "--steps", "1", "--json").json["images"]
    assert [image["path"] for image in drawn] == [str(here / "home.png")]
    assert conceptzap("stack", "~/a", "--output=~/c").out == f"{here / f'c{SUFFIX}'}\n"
    plan = conceptzap("erase", "@~/words.txt", "-o~/d", "--dry-run", "--json").json
    assert plan["output"] == str(here / f"d{SUFFIX}") and plan["concepts"] == ["a church"]
    assert not (here / "~").exists()


def test_a_prompt_is_literal_all_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    conceptzap("generate", "~/church", *DRAW, "-o", "x.png")
    assert read_text(here / "x.png")["prompt"] == "~/church"


# what a shell makes of --with *


@pytest.mark.parametrize("prompt", [f"b{SUFFIX}", "b.lprompt", f"./b{SUFFIX}"])
def test_a_prompt_that_is_an_erasure_s_file_is_refused(prompt: str, here: Path) -> None:
    before = contents(here)
    answer = conceptzap("generate", "a cat", "--with", f"a{SUFFIX}", prompt, *DRAW)
    assert answer.code == 2 and f"--with {prompt}" in answer.error, answer
    with pytest.raises(UsageError, match="is an erasure's file"):
        package.generate(["a cat", prompt], base="base")
    assert contents(here) == before


def test_a_prompt_may_be_called_like_an_erasure(here: Path) -> None:
    answer = conceptzap("generate", "church", "--with", "church", *DRAW)
    assert answer.code == 0 and "is called" not in answer.err
    alone = conceptzap("generate", "church", *DRAW, "-o", "alone.png")
    assert alone.code == 0 and "an erasure here is called 'church', too: draw with it by --with church" in alone.err
    assert conceptzap("generate", f"nowhere{SUFFIX}", *DRAW, "-o", "y.png").code == 0
