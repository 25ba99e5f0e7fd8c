"""Bad input through the real command line: its code, one line, no traceback, nothing changed."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from command import refused
from samples import altered, header, relabelled, rich, small, tensor

from conceptzap import format
from conceptzap.edit import BaseRef, Edit, Raw
from conceptzap.testing import save_tiny

SUFFIX = ".lprompt.safetensors"
GOOD, KEY, OTHER = f"good{SUFFIX}", f"key{SUFFIX}", f"other{SUFFIX}"
BASE = ("--base", "base")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, sound erasures and everything that is wrong in a way of its own."""
    folder = tmp_path_factory.mktemp("bad")
    save_tiny(folder / "base")
    format.save(small(), folder / GOOD)
    sound = (folder / GOOD).read_bytes()
    elsewhere = BaseRef("sd2", "elsewhere", "", "6" * 64, {"attn2": "c" * 64, "text": "d" * 64})
    format.save(replace(rich(), header=header(base=elsewhere)), folder / OTHER)
    (folder / "prompts.txt").write_text("\n\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "a folder").mkdir()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    hostile = {
        "empty": b"", "truncated": sound[:-7], "flipped": bytes(flipped), "longer": sound + b"\0",
        "version": relabelled(format="lprompt/2"), "foreign": relabelled(format=None),
        "pickle": pickle.dumps({"a": 1}), "page": b"<!doctype html><html></html>",
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(99), "gguf": b"GGUF" + bytes(99),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    }  # fmt: skip
    for name, data in (hostile | forged(sound)).items():
        (folder / f"{name}{SUFFIX}").write_bytes(data)
    with zipfile.ZipFile(folder / f"zip{SUFFIX}", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    for name, count in (("many", 600), ("more", 500)):
        rows = {f"prompt_{x}": tensor("F16", count, 3, seed=count) for x in "kv"}
        edit = Edit("tokens", ("unet.mid_block.attn2",), rows)
        format.save(replace(small(), edits=(edit,)), folder / f"{name}{SUFFIX}")
    for name in ("ckpt", "pt", "pth", "bin", "pkl"):
        (folder / f"weights.{name}").write_bytes(pickle.dumps({}))
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    for name in ("there", "horse"):
        (folder / f"{name}{SUFFIX}").write_bytes(b"mine")
    (folder / "there.png").write_bytes(b"mine")
    return folder


CONFIGS = {
    "tagged.yaml": "method: !!python/object:os.system {}\n",
    "unknown.toml": "sed = 3\n",
    "kind.toml": 'seed = "3"\n',
    "torn.toml": "seed = = 3\n",
    "escaping.lock": 'schema = "conceptzap.lock/1"\nfiles = [{path = "/etc/passwd"}]\n',
}


def forged(sound: bytes) -> dict[str, bytes]:
    """Files that are no more than nearly safetensors, or hold what no erasure may."""
    length = int.from_bytes(sound[:8], "little")
    header, buffer = sound[8 : 8 + length], sound[8 + length :]
    entries = json.loads(header)
    first, second = sorted(entries.keys() - {"__metadata__"})
    twice = header.replace(b"{", f'{{"{first}":{json.dumps(entries[first])},'.encode(), 1)
    entries[second]["data_offsets"] = entries[first]["data_offsets"]

    def packed(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + buffer

    def spoilt(_: object, tensors: dict[str, Raw]) -> None:
        name = min(name for name, one in tensors.items() if one.dtype == "F32")
        tensors[name] = tensors[name]._replace(data=b"\xff" * len(tensors[name].data))

    return {
        "overflow": (2**63).to_bytes(8, "little") + sound[8:],
        "huge": (2**27).to_bytes(8, "little") + header + bytes(2**21),
        "twice": packed(twice),
        "overlap": packed(json.dumps(entries).encode()),
        "nan": altered(spoilt),
        "traversal": altered(lambda _, tensors: tensors.update({"../../passwd": tensor("F16", 1)})),
    }


ERASE = [
    (2, "is empty", ""),
    (2, "is empty", "  \t"),
    (2, "is empty", "?!."),
    (2, "is empty", "\u200b\u202e"),
    (2, "no concept given", "@prompts.txt"),
    (2, "not UTF-8", "@latin.txt"),
    (2, "cannot read nowhere.txt", "@nowhere.txt"),
    (2, "both 'cat'", "cat", "--anchor", "Cat"),
    (2, "--anchor is followed by the option --dry-run", "cat", "--anchor", "--dry-run"),
    (2, "-o is followed by the option -n", "cat", "-o", "-n"),
    (2, "unknown kind 'art'", "cat", "--kind", "art"),
    (2, "did you mean --anchor?", "cat", "--target", "dog"),
    (2, "both 'caf\u00e9'", "cafe\u0301", "--anchor", "caf\u00e9"),
    (2, "both 'cat'", "c\u200bat\u202e", "--anchor", "cat"),
    (2, "2 anchors for 1", "cat", "--anchor", "dog", "--anchor", "horse"),
    (2, "no method is called", "cat", "--method", "nope"),
    (2, "no preset is called", "cat", "--preset", "nope"),
    (2, "unknown setting", "cat", "--set", "nope=1"),
    (2, "is not an int", "cat", "--set", "steps=many"),
    (2, "is not a float", "cat", "--set", "lr=nan"),
    (2, "--steps", "cat", "--steps", "0"),
    (2, "--steps", "cat", "--steps", "-1"),
    (2, "--seed", "cat", "--seed", "-1"),
    (2, "--seed", "cat", "--seed", str(2**63)),
    (2, "--seed", "cat", "--seed", "1.5"),
    (2, "--seed", "cat", "--seed", "true"),
    (2, "cannot read nowhere.toml", "cat", "--config", "nowhere.toml"),
    (2, "tagged.yaml", "cat", "--config", "tagged.yaml"),
    (2, "did you mean seed", "cat", "--config", "unknown.toml"),
    (2, "seed = '3' is not a whole number", "cat", "--config", "kind.toml"),
    (2, "torn.toml", "cat", "--config", "torn.toml"),
    (2, "exists", "horse"),
    (2, "exists", "cat", "-o", "there"),
    (2, "no folder", "cat", "-o", "nowhere/cat"),
    (2, "has no name", "cat", "-o", SUFFIX),
    (2, "is no device", "cat", *BASE, "--device", "gpu"),
    (2, "is unknown", "cat", *BASE, "--dtype", "int8"),
    (5, "this machine has no cuda:99", "cat", *BASE, "--device", "cuda:99"),
    (5, "nowhere", "cat", "--base", "./nowhere"),
    (5, "did you mean base", "cat", "--base", "./bas"),
    (5, "weights.ckpt is a pickle", "cat", "--base", "weights.ckpt"),
    (5, "weights.pt is a pickle", "cat", "--base", "weights.pt"),
    (5, "weights.bin is a pickle", "cat", "--base", "weights.bin"),
    (2, "does not know 'zzzzz'", "zzzzz", *BASE),
    (2, "does not know 'кошка'", "кошка", *BASE),
    (2, "does not know '\N{CAT FACE}a'", "\N{CAT FACE}a", *BASE),
    (2, "does not know 'c\u0430t'", "c\u0430t", *BASE),
    (2, "tokens long", " ".join(["cat"] * 90), *BASE),
]


@pytest.mark.parametrize(("code", "message", "words"), [(c, m, w) for c, m, *w in ERASE])
def test_what_erase_refuses(
    code: int, message: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    refused(made, code, message, "erase", *words)


SIZES = [
    ("--height", "0"), ("--height", "15"), ("--width", "-8"), ("--size", "8x"),
    ("--size", "64 by 64"), ("--width", "wide"),
]  # fmt: skip
# what other programs call an option, and we do
HABITS = [
    ("--cfg", "--guidance"), ("--guidance-scale", "--guidance"), ("--negative-prompt", "--negative"),
    ("-n", "--count"), ("--num-images", "--count"), ("--num-inference-steps", "--steps"),
    ("--model", "--base"), ("--scheduler", "--sampler"),
]  # fmt: skip
GENERATE = [
    (2, "no picture was asked for",),
    (2, "no picture was asked for", "--prompts", "prompts.txt"),
    (2, "cannot read nowhere.txt", "--prompts", "nowhere.txt"),
    (2, "no picture was asked for", "a cat", "--count", "0"),
    (2, "no picture was asked for", "a cat", "--count", "-1"),
    (2, "--steps", "a cat", "--steps", "0"),
    (2, "--steps", "a cat", "--steps", "-1"),
    (2, "--steps", "a cat", "--steps", "1001"),
    (2, "--guidance", "a cat", "--guidance", "nan"),
    (2, "--guidance", "a cat", "--guidance", "inf"),
    (2, "--guidance", "a cat", "--guidance", "-1"),
    (2, "--guidance", "a cat", "--guidance", "51"),
    (2, "--guidance", "a cat", "--guidance", "much"),
    (2, "--seed", "a cat", "--seed", "-1"),
    (2, "--seed", "a cat", "--seed", str(2**63)),
    (2, "--seed", "a cat", "--seed", str(2**64)),
    (2, "--seed", "a cat", "--seed", "1.5"),
    (2, "--seed", "a cat", "--seed", "true"),
    (2, "--seed", "a cat", "--seed", str(2**63 - 1), "--count", "2"),
    (2, "--batch", "a cat", "--batch", "0"),
    (2, "strength", "a cat", "--with", f"{GOOD}:2.1"),
    (2, "strength", "a cat", "--with", f"{GOOD}:-1"),
    (2, "strength", "a cat", "--with", f"{GOOD}:nan"),
    (2, "strength", "a cat", "--with", f"{GOOD}:much"),
    (2, "at the strengths", "a cat", "--with", GOOD, "--with", f"{GOOD}:0.5"),
    (2, "1100 learned tokens", "a cat", "--with", f"many{SUFFIX}", "--with", f"more{SUFFIX}"),
    *((2, option[0], "a cat", *option) for option in SIZES),
    (2, "--height 4096 is out of range", "a cat", "--size", "4096"),
    (2, "no sampler is called 'nope'", "a cat", "--sampler", "nope"),
    *((2, f"did you mean {ours}?", "a cat", theirs, "3") for theirs, ours in HABITS),
    (2, "is not UTF-8", "a cat \udcff"),
    (2, "is not UTF-8", "a cat", "--negative", "\udcff dog"),
    (2, "--with is followed by the option --strict", "a cat", "--with", "--strict"),
    (2, "--negative is followed by the option --seed=3", "a cat", "--negative", "--seed=3"),
    (2, "exists", "a cat", *BASE, "-o", "there.png"),
    (2, "2 pictures do not fit", "a cat", *BASE, "--count", "2", "-o", "new.png"),
    (2, "is not a folder", "a cat", *BASE, "-o", GOOD),
    (2, "no folder", "a cat", *BASE, "-o", "nowhere/new.png"),
    (2, "is no device", "a cat", *BASE, "--device", "gpu"),
    (5, "this machine has no cuda:99", "a cat", *BASE, "--device", "cuda:99"),
    (5, "nowhere", "a cat", "--base", "./nowhere"),
    (5, "the hub cannot be reached", "a cat", "--base", "nobody/nothing"),
    (2, "nowhere.lock", "a cat", "--policy", "nowhere.lock"),
    (6, "without the policy's erasures", "a cat", "--policy", "x", "--compare"),
    (3, f"did you mean {GOOD}", "a cat", "--with", f"goood{SUFFIX}"),
    (3, "pickle", "a cat", "--with", "weights.ckpt"),
    (3, "pickle", "a cat", "--with", "weights.bin"),
    (3, "is a folder", "a cat", "--with", "a folder"),
    (4, "another architecture", "a cat", *BASE, "--with", OTHER),
]


@pytest.mark.parametrize(("code", "message", "words"), [(c, m, w) for c, m, *w in GENERATE])
def test_what_generate_refuses(
    code: int, message: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    refused(made, code, message, "generate", *words)


BAD_FILES = [
    ("empty", "is empty"),
    ("truncated", "truncated"),
    ("flipped", "flipped"),
    ("longer", "longer"),
    ("version", "it needs a newer conceptzap"),
    ("foreign", "foreign"),
    ("pickle", "pickle"),
    ("zip", "zip"),
    ("page", "web page"),
    ("picture", "PNG"),
    ("gguf", "GGUF"),
    ("pointer", "git lfs pull"),
    ("overflow", "no safetensors file"),
    ("huge", "no safetensors file"),
    ("twice", "is there twice"),
    ("overlap", "not in canonical form"),
    ("nan", ".down has 4 values that are NaN"),
    ("weights.ckpt", "pickle"),
    ("weights.pt", "pickle"),
    ("weights.pth", "pickle"),
    ("weights.pkl", "pickle"),
    ("traversal", "its digest is"),
    ("nowhere", "no such file"),
    ("a folder", "is a folder"),
]


@pytest.mark.parametrize("command", ["inspect", "stack", "generate", "evaluate", "lock"])
@pytest.mark.parametrize(("name", "message"), BAD_FILES)
def test_a_bad_erasure_file(
    command: str, name: str, message: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    path = name if (made / name).exists() else f"{name}{SUFFIX}"
    words = {
        "inspect": [path],
        "stack": [GOOD, path, "-o", "new"],
        "generate": ["a cat", "--with", path],
        "evaluate": [path, "-o", "scores"],
        "lock": [path, "-o", "new.lock"],
    }[command]
    refused(made, 3, message, command, *words)


STACK = [
    (2, "exists", GOOD, "-o", "there"),
    (2, "no folder", GOOD, "-o", "nowhere/new"),
    (4, "cannot stack", GOOD, OTHER, "-o", "new"),
]


@pytest.mark.parametrize(("code", "message", "words"), [(c, m, w) for c, m, *w in STACK])
def test_what_stack_refuses(
    code: int, message: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    refused(made, code, message, "stack", *words)


OTHERS = [
    (2, "no method is called", "methods", "nope"),
    (2, "no preset is called", "presets", "../secrets"),
    (2, "nowhere.lock", "verify", "nowhere.lock"),
    (2, "escaping.lock", "verify", "escaping.lock"),
    (2, "there.png exists", "demo", "-o", "there.png"),
    (2, "--seed", "demo", "--seed", "-1", "-o", "new.png"),
]


@pytest.mark.parametrize(("code", "message", "words"), [(c, m, w) for c, m, *w in OTHERS])
def test_what_other_commands_refuse(
    code: int, message: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    refused(made, code, message, *words)


@contextmanager
def read_only() -> Iterator[Path]:
    """A folder that this process may not write to; root gives up its rights meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        format.save(small(), folder / GOOD)
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


@pytest.mark.parametrize(
    "words",
    [
        ["erase", "cat", "-o"],
        ["generate", "a cat", "--with", GOOD, "-o"],
        ["stack", GOOD, "-o"],
        ["lock", GOOD, "-o"],
        ["demo", "-o"],
    ],
    ids=lambda words: words[0],
)
def test_a_read_only_folder_is_noticed_before_any_work(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("conceptzap.base.load_base", work)
    name = {"generate": "new.png", "demo": "new.png"}.get(words[0], "new")
    with read_only() as folder:
        monkeypatch.chdir(folder)
        refused(folder, 5, "cannot write in", *words, name)
        monkeypatch.undo()
