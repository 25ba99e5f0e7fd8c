"""Broken checkpoints, erasures that do not belong, and a machine that refuses: the command line's answer."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import conceptzap, contents, refused
from erasures import nudge
from refusals import edit_json
from safetensors.torch import load_file, save_file
from samples import small, tensor
from test_disks import mounted

from conceptzap import format
from conceptzap.base import Base, loading
from conceptzap.base.bpe import clip_tokenizer
from conceptzap.edit import Edit, Erasure
from conceptzap.format.pictures import read_text
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


@pytest.fixture(scope="module", autouse=True)
def sound_parts_once() -> Iterator[None]:
    """What was made of the files of a part is there for the next checkpoint that has the same."""
    real, loaded = loading._load_part, {}

    def load(folder: Path, part: str, dtype: torch.dtype) -> object:
        files = tuple((path.name, path.read_bytes()) for path in sorted((folder / part).glob("*")))
        if (part, dtype, files) not in loaded:
            loaded[part, dtype, files] = real(folder, part, dtype)
        return loaded[part, dtype, files]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_load_part", load)
        yield


def misplaced(erasure: Erasure) -> Erasure:
    """At a module that no base of its architecture has."""
    edit = erasure.edits[0]
    site = edit.sites[0].replace("blocks.0", "blocks.9", 1)
    moved = replace(edit, sites=(site,))
    (test,) = erasure.header.canary.values()
    canary = {moved.name: {**test, "edits": [moved.name]}}
    return replace(erasure, header=replace(erasure.header, canary=canary), edits=(moved,))


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(world)
    yield world
    (world / "new.png").unlink(missing_ok=True)  # a picture that should not be fails one test only


# checkpoints


def weights(part: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = part.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def scaled(part: Path, name: str, factor: float) -> None:
    weights(part, lambda tensors: tensors.update({name: tensors[name] * factor}))


def pickled(base: Path) -> None:
    for path in (base / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def exchanged(base: Path, other: str) -> None:
    shutil.rmtree(base / "text_encoder")
    shutil.copytree(base.parent / other / "text_encoder", base / "text_encoder")


def retokenised(base: Path) -> None:
    shutil.rmtree(base / "tokenizer")
    clip_tokenizer().save_pretrained(str(base / "tokenizer"))


def sized(base: Path, size: object) -> None:
    edit_json(base / "unet" / "config.json", sample_size=size)


def code_of_its_own(base: Path) -> None:
    (base / "my_code.py").write_text("raise SystemExit('this ran')\n")
    index = json.loads((base / "model_index.json").read_text())
    index["unet"] = ["my_code", "MyUNet"]
    (base / "model_index.json").write_text(json.dumps(index))


BROKEN: list[tuple[str, int, str, Callable[[Path], object]]] = [
    ("NaN", 5, "NaN or infinity in conv_in.weight",
     lambda base: scaled(base / "unet", "conv_in.weight", math.nan)),
    ("lacks", 4, "conv_in.bias",
     lambda base: weights(base / "unet", lambda tensors: tensors.pop("conv_in.bias"))),
    ("pickled", 5, "pickle", pickled),
    ("no index", 5, "model_index.json", lambda base: (base / "model_index.json").unlink()),
    ("bad index", 5, "model_index.json", lambda base: (base / "model_index.json").write_text("{")),
    ("bad config", 5, "config.json", lambda base: (base / "unet/config.json").write_text("[]")),
    ("bad scheduler", 5, "scheduler_config.json",
     lambda base: (base / "scheduler/scheduler_config.json").write_text("{")),
    ("bad tokenizer", 5, "tokenizer",
     lambda base: (base / "tokenizer/tokenizer.json").write_text("{")),
    ("no vocabulary", 5, "has no vocabulary",
     lambda base: (base / "tokenizer/tokenizer.json").unlink()),
    ("another text encoder", 4, "40 numbers", lambda base: exchanged(base, "second")),
    ("another tokenizer", 4, "49408 tokens", retokenised),
    ("own code", 4, "my_code.MyUNet", code_of_its_own),
    ("no size", 4, "size 0", lambda base: sized(base, 0)),
    ("less than no size", 4, "size -8", lambda base: sized(base, -8)),
    ("huge size", 4, "size 1048576", lambda base: sized(base, 2**20)),
    ("no width", 4, "size [8, 0]", lambda base: sized(base, [8, 0])),
    ("diverging", 5, "the latents are not finite",
     lambda base: scaled(base / "unet", "conv_out.weight", 1e30)),
    ("overflowing", 5, "the decoded pictures are not finite",
     lambda base: scaled(base / "vae", "decoder.conv_in.weight", 1e37)),
]  # fmt: skip


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


def test_another_text_encoder_of_the_same_sizes_is_another_checkpoint(here: Path) -> None:
    base = Path(shutil.copytree(here / "base", here / "retold"))
    try:
        exchanged(base, "fine-tune")
        words = (*DRAW, "retold", "--with", GOOD, "--strict", "-o", "new.png")
        refused(here, 4, "another checkpoint", *words)
    finally:
        shutil.rmtree(base)


def test_a_policy_without_its_base_or_its_file_draws_nothing(here: Path, tmp_path: Path) -> None:
    file, lock = tmp_path / GOOD, tmp_path / "my.lock"
    shutil.copyfile(here / GOOD, file)
    assert conceptzap("lock", file, "--base", "base", "-o", lock).code == 0
    words = ("--policy", lock, "-o", tmp_path / "new.png")
    refused(tmp_path, 6, "its attn2 weights are others", *DRAW, "fine-tune", *words)
    refused(tmp_path, 6, "another architecture", *DRAW, "second", *words)
    file.unlink()
    refused(tmp_path, 6, "no such file", *DRAW, "base", *words)
    refused(tmp_path, 6, "no such file", "verify", lock)


def test_another_checkpoint_is_warned_of_and_recorded(here: Path) -> None:
    answer = conceptzap(*DRAW, "fine-tune", "--with", GOOD, "-o", "foreign.png")
    assert answer.code == 0 and answer.err.count("warning: ") == 1
    assert "another checkpoint" in answer.err
    assert "another checkpoint" in read_text(here / "foreign.png")["warning"]


@pytest.mark.parametrize("kind", ["_forward_hooks", "_forward_pre_hooks"])
def test_a_hook_lost_after_the_self_test_leaves_no_picture(
    kind: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, site = Base.predict, nudge(tiny("sd1"), "church").edits[0].sites[0]
    calls: list[int] = []

    def predict(self: Base, *given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 3 == 0:  # the self-test, the first step, and now the second
            getattr(self.module(site), kind).clear()
        return real(self, *given)

    monkeypatch.setattr(Base, "predict", predict)
    refused(here, 6, site, *DRAW, "base", "--with", GOOD, "-o", "new.png")


def test_half_precision_on_a_cpu_is_full_precision(here: Path) -> None:
    for dtype in ("float16", "bfloat16", "auto"):
        words = (*DRAW, "base", "--dtype", dtype, "--device", "cpu", "-o", f"{dtype}.png")
        assert conceptzap(*words).code == 0
    assert len({(here / f"{dtype}.png").read_bytes() for dtype in ("float16", "bfloat16", "auto")}) == 1


# the machine


def on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nand a long table")


@pytest.mark.parametrize(
    "work", [on_the_gpu, lambda: torch.empty(2**60), lambda: bytearray(2**60)],
    ids=["gpu", "tensor", "python"],
)  # fmt: skip
def test_out_of_memory(
    work: Callable[[], object], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "predict", lambda *_: work())
    refused(here, 5, "out of memory", *DRAW, "base", "-o", "new.png")


@pytest.fixture(params=["full", "read-only"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    options = {"full": "size=64k", "read-only": "ro"}[request.param]
    for folder in mounted(tmp_path, "-t", "tmpfs", "-o", options, "tmpfs"):
        if request.param == "full":
            (folder / "filler").write_bytes(bytes(65536))
        yield folder


def test_a_disk_that_takes_nothing(disk: Path, here: Path) -> None:
    word = "bytes needed, 0 free" if (disk / "filler").exists() else "Read-only"
    for words in (("stack", GOOD, "-o", disk / "new"), (*DRAW, "base", "-o", disk / "new.png")):
        refused(disk, 5, word, *words)
    refused(disk, 5, word, "erase", "cat", "--base", "base", "-o", disk / "new")


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_a_disk_that_fills_up_after_the_first_look(
    force: bool, tmp_path: Path, here: Path
) -> None:
    """There is room for a small erasure, and this one is large."""
    site = nudge(tiny("sd1"), "church").edits[0].sites[0]
    large = Edit("weight", (site,), {"delta": tensor("F16", 100, 1000)})
    format.save(replace(small(), edits=(large,)), here / f"large{SUFFIX}", force=True)
    for folder in mounted(tmp_path, "-t", "tmpfs", "-o", "size=160k", "tmpfs"):
        words = ("stack", f"large{SUFFIX}", "-o", folder / "new", *["--force"][:force])
        if force:
            (folder / f"new{SUFFIX}").write_bytes(b"the old one")
        refused(folder, 5, "bytes needed", *words)
        assert list(contents(folder)) == [f"new{SUFFIX}"][:force]


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
