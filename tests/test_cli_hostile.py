"""Broken checkpoints, erasures that do not belong, and a machine that refuses: the command line's answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import conceptzap, contents, refused
from erasures import nudge
from safetensors.torch import load_file, save_file
from test_disks import mounted

from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Erasure
from conceptzap.pictures import read_text
from conceptzap.testing import save_tiny, tiny

SUFFIX = ".lprompt.safetensors"
GOOD = f"good{SUFFIX}"
DRAW = ("generate", "a church", "--steps", "2", "--guidance", "2", "--base")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name, family, seed in (("base", "sd1", 0), ("fine-tune", "sd1", 1), ("second", "sd2", 0)):
        save_tiny(folder / name, family, seed=seed)
    erasure = nudge(tiny("sd1"), "church")
    format.save(erasure, folder / GOOD)
    format.save(misplaced(erasure), folder / f"misplaced{SUFFIX}")
    untested = replace(erasure, header=replace(erasure.header, canary={}))
    format.save(untested, folder / f"untested{SUFFIX}")
    return folder


def misplaced(erasure: Erasure) -> Erasure:
    """At a module that no base of its architecture has."""
    edit = erasure.edits[0]
    site = edit.sites[0].replace("blocks.0", "blocks.9", 1)
    moved = replace(edit, sites=(site,))
    (test,) = erasure.header.canary.values()
    canary = {moved.name: {**test, "edits": [moved.name]}}
    return replace(erasure, header=replace(erasure.header, canary=canary), edits=(moved,))


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


# checkpoints


def weights(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def pickled(base: Path) -> None:
    for path in (base / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def exchanged(base: Path) -> None:
    shutil.rmtree(base / "text_encoder")
    shutil.copytree(base.parent / "second" / "text_encoder", base / "text_encoder")


def code_of_its_own(base: Path) -> None:
    (base / "my_code.py").write_text("raise SystemExit('this ran')\n")
    index = json.loads((base / "model_index.json").read_text())
    index["unet"] = ["my_code", "MyUNet"]
    (base / "model_index.json").write_text(json.dumps(index))


BROKEN: list[tuple[str, int, str, Callable[[Path], object]]] = [
    ("nan", 5, "NaN", lambda base: weights(base, lambda t: t["conv_in.weight"].fill_(torch.nan))),
    ("lacks", 4, "conv_in.bias", lambda base: weights(base, lambda t: t.pop("conv_in.bias"))),
    ("pickled", 5, "pickle", pickled),
    ("no index", 5, "model_index.json", lambda base: (base / "model_index.json").unlink()),
    ("bad index", 5, "model_index.json", lambda base: (base / "model_index.json").write_text("{")),
    ("bad config", 5, "config.json", lambda base: (base / "unet/config.json").write_text("[]")),
    ("another text encoder", 4, "numbers", exchanged),
    ("own code", 4, "unet", code_of_its_own),
]


@pytest.mark.parametrize(
    ("code", "message", "spoil"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_a_broken_checkpoint(
    code: int, message: str, spoil: Callable[[Path], object], here: Path
) -> None:
    base = Path(shutil.copytree(here / "base", here / "broken"))
    try:
        spoil(base)
        refused(here, code, message, *DRAW, "broken", "--with", GOOD, "-o", "new.png")
    finally:
        shutil.rmtree(base)


# erasures on a base that is not theirs


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (4, "another architecture", ("second", "--with", GOOD)),
        (4, "another checkpoint", ("fine-tune", "--with", GOOD, "--strict")),
        (4, "has no module", ("base", "--with", f"misplaced{SUFFIX}")),
        (6, "has no self-test", ("base", "--with", f"untested{SUFFIX}")),
    ],
)
def test_an_erasure_that_does_not_belong(
    code: int, message: str, words: tuple[str, ...], here: Path
) -> None:
    refused(here, code, message, *DRAW, *words, "-o", "new.png")


def test_another_checkpoint_is_warned_of_and_recorded(here: Path) -> None:
    answer = conceptzap(*DRAW, "fine-tune", "--with", GOOD, "-o", "foreign.png")
    assert answer.code == 0 and answer.err.count("warning: ") == 1
    assert "another checkpoint" in answer.err
    assert "another checkpoint" in read_text(here / "foreign.png")["warning"]


@pytest.mark.parametrize("kind", ["_forward_hooks", "_forward_pre_hooks"])
def test_a_hook_lost_after_the_self_test_leaves_no_picture(
    kind: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, site = Base.eps, nudge(tiny("sd1"), "church").edits[0].sites[0]
    calls: list[int] = []

    def eps(self: Base, *given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 3 == 0:  # the self-test, the first step, and now the second
            getattr(self.module(site), kind).clear()
        return real(self, *given)

    monkeypatch.setattr(Base, "eps", eps)
    refused(here, 6, site, *DRAW, "base", "--with", GOOD, "-o", "new.png")


# prompts


def test_a_prompt_that_is_too_long_says_what_is_left_out(here: Path) -> None:
    words = ("generate", "cat " * 74 + "dog horse church", "--steps", "1", "--base", "base")
    answer = conceptzap(*words, "-o", "long.png")
    assert answer.code == 0
    assert "warning: only 75 tokens are read, without: horse church\n" in answer.err


def test_the_empty_prompt_is_drawn_and_noted(here: Path) -> None:
    answer = conceptzap("generate", "", "--steps", "1", "--base", "base", "-o", "empty.png")
    assert answer.code == 0 and "the empty prompt" in answer.err


def test_prompt_files_of_other_systems(here: Path) -> None:
    """A byte order mark and their line ends."""
    (here / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\na dog\r\n".encode())
    words = ("--prompts", "prompts.txt", "--steps", "1", "--base", "base", "-o", "lists", "--json")
    images = conceptzap("generate", *words).json["images"]
    assert [image["prompt"] for image in images] == ["a cat", "a dog"]


def test_half_precision_on_a_cpu_is_full_precision(here: Path) -> None:
    for dtype in ("float16", "bfloat16", "auto"):
        words = (*DRAW, "base", "--dtype", dtype, "--device", "cpu", "-o", f"{dtype}.png")
        assert conceptzap(*words).code == 0
    assert len({(here / f"{dtype}.png").read_bytes() for dtype in ("float16", "bfloat16", "auto")}) == 1


# the machine


def test_out_of_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def eps(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left\nand a long table")

    monkeypatch.setattr(Base, "eps", eps)
    refused(here, 5, "out of memory", *DRAW, "base", "-o", "new.png")


@pytest.fixture(params=["full", "read-only"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    options = {"full": "size=64k", "read-only": "ro"}[request.param]
    for folder in mounted(tmp_path, "-t", "tmpfs", "-o", options, "tmpfs"):
        if request.param == "full":
            (folder / "filler").write_bytes(bytes(65536))
        yield folder


def test_a_disk_that_takes_nothing(disk: Path, here: Path) -> None:
    word = "no space" if (disk / "filler").exists() else "Read-only"
    for words in (("stack", GOOD, "-o", disk / "new"), (*DRAW, "base", "-o", disk / "new.png")):
        refused(disk, 5, word, *words)
    refused(disk, 5, word, "erase", "cat", "--base", "base", "-o", disk / "new")


def forked(work: Callable[[], int]) -> int:
    child = os.fork()
    if not child:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_while_it_writes_nothing_is_torn_and_the_next_run_sweeps(
    tmp_path: Path, here: Path
) -> None:
    def dies() -> int:
        os.link = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        return conceptzap("stack", GOOD, "-o", tmp_path / "new").code

    assert ended(forked(dies)) == -signal.SIGKILL
    (left,) = contents(tmp_path)
    assert left.endswith(".tmp")
    assert conceptzap("stack", GOOD, "-o", tmp_path / "new").code == 0
    assert list(contents(tmp_path)) == [f"new{SUFFIX}"]


def test_of_several_writers_one_wins_and_the_others_are_told(tmp_path: Path, here: Path) -> None:
    words = ("stack", GOOD, "-o", tmp_path / "new")
    children = [forked(lambda: conceptzap(*words).code) for _ in range(4)]
    assert sorted(map(ended, children)) == [0, 2, 2, 2]
    assert list(contents(tmp_path)) == [f"new{SUFFIX}"]
    assert conceptzap("inspect", tmp_path / f"new{SUFFIX}").code == 0


@pytest.mark.parametrize("name", [b"two words", b"two\nlines", b"no utf8 \xff", "église".encode()])
def test_any_name_without_home_locale_or_terminal(name: bytes, here: Path, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), name + SUFFIX.encode())
    shutil.copyfile(GOOD, path)
    source = str(Path(format.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "conceptzap", "inspect", path],
        env={"PYTHONPATH": source, "LC_ALL": "C", "PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"church" in done.stdout and done.stderr == b""
