"""What is never exported, bad input, and the command itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import edits as some
import pytest
from command import conceptzap as program
from command import refused
from exported import (
    CLOSE,
    FORMATS,
    SUFFIX,
    bytes_of,
    is_exported,
    save,
    seen,
    through_diffusers,
)
from samples import header
from samples import small as sample
from test_cli_bad_input import read_only

import conceptzap
from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.edit import Edit
from conceptzap.testing import save_tiny, tiny

# what cannot be exported


@cache
def misfits(base: Base) -> dict[str, tuple[str, list[Edit]]]:
    gate, weight = some.gate(base), some.low_rank(base)
    many = len(base.sites("unet.*.attn2"))
    return {
        "gated": (f"1 of 2 edits: weight (down, into) at {2 * many} modules behind 1 gate",
                  [some.shared(base, gates=[gate]), weight]),
        "window": ("1 of 1 edit: weight (down, up) at 1 module behind 1 gate",
                   [some.low_rank(base, gates=[some.window(0, 999)])]),
        "tokens": (f"1 of 2 edits: tokens at {many} modules", [some.tokens(base), weight]),
        "rows": ("tokens at 1 module", [some.key_values(base)]),
        "adapter": ("1 of 2 edits: adapter at 1 module", [some.adapter(base), weight]),
        **{f"adapter {name}": ("1 of 1 edit: adapter at ", [one]) for name, one in adapters(base).items()},
        "gated adapter": ("1 of 2 edits: adapter at 1 module behind 1 gate",
                          [some.adapter(base, gates=[gate]), weight]),
        "one row": ("1 of 1 edit: weight", [some.conditional(some.shared(base))]),
        "default": (f"2 of 2 edits: tokens at {many} modules behind 1 gate; weight (down, into)",
                    list(some.eraser(base))),
    }  # fmt: skip


def adapters(base: Base) -> dict[str, Edit]:
    """Every form of them: what they do to x, where they stand, which way they write."""
    return {
        "plain": some.adapter(base, phi="none"), "gelu": some.adapter(base, phi="gelu", reads="y"),
        "topk": some.adapter(base, phi="topk", k=2), "attend": some.attending(base),
        "project": some.projecting(base), "block": some.beside(base), "skip": some.skip(base),
    }  # fmt: skip


ADAPTERS = [f"adapter {name}" for name in ("plain", "gelu", "topk", "attend", "project", "block", "skip")]
KINDS = ["gated", "window", "tokens", "rows", "adapter", "gated adapter", "one row", "default", *ADAPTERS]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_half_an_erasure_is_never_exported(kind: str, to: str, sd1: Base, tmp_path: Path) -> None:
    """The one line lists what does not fit and says what to do; no base is loaded for it."""
    message, edits = misfits(sd1)[kind]
    path = save(tmp_path, sd1, "a", edits)
    words = ["export", path, "--to", to, "-o", tmp_path / "out", "--base", "./nowhere"]
    refused(tmp_path, 6, message, *words)
    said = program(*words).err
    # a pipeline folder keeps gates, tokens and adapters, but is not told which row is which
    assert "load it with conceptzap" in said and ("--to diffusers holds it whole; or" in said) is (kind != "one row")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and erasures, sound and unfit ones."""
    folder, base = tmp_path_factory.mktemp("exports"), tiny("sd1")
    save_tiny(folder / "base")
    save_tiny(folder / "sd2", "sd2")
    files = {
        "good": [some.low_rank(base)],
        "dense": [some.delta(base), some.mask(base, some.CONVS), some.shared(base)],
        "nameless": [some.low_rank(base, "unet.conv_in"), some.low_rank(base)],
        "sampler": [some.low_rank(base, "unet.*samplers.0.conv")],
    }
    for name, edits in files.items():
        save(folder, base, name, edits)
    for role in ("key", "attack"):
        save(folder, base, role, [replace(some.low_rank(base), role=role), some.shared(base)])
    elsewhere = replace(sample(), header=header(title="elsewhere"))
    format.save(elsewhere, folder / f"elsewhere{SUFFIX}")
    (folder / "there.safetensors").write_bytes(b"mine")
    (folder / "there").mkdir()
    (folder / "there" / "mine.txt").write_text("mine")
    return folder


LORA, CHECKPOINT = ("--to", "lora"), ("--to", "checkpoint")
OUT = ("-o", "new")
BAD = [
    (2, "no export is called 'loar'", "good", "--to", "loar", *OUT),
    (2, "--to", "good", *OUT),
    (2, "--output", "good", *LORA),
    (2, "strength 3", "good:3", *LORA, *OUT),
    (2, "at strength 0 is absent", "good:0", *LORA, *OUT),
    (2, "exists", "good", *LORA, "-o", "there.safetensors"),
    (2, "is a folder", "good", *LORA, "-o", "there"),
    (2, "is what an erasure is called", "good", *LORA, "-o", f"new{SUFFIX}"),
    (2, "no folder", "good", *LORA, "-o", "nowhere/new"),
    (2, "no folder", "good", *CHECKPOINT, "-o", "nowhere/new"),
    (2, "exists", "good", *CHECKPOINT, "-o", "there"),
    (2, "was not written by export", "good", *CHECKPOINT, "-o", "there", "--force"),
    (2, "was not written by export", "good", *CHECKPOINT, "-o", "base", "--base", "base", "--force"),
    (2, "is not a folder", "good", *CHECKPOINT, "-o", "base/model_index.json", "--force"),
    (6, "words of its own", "good", *CHECKPOINT, "-o", "there.safetensors", "--force"),
    (2, "would be a folder", "good", "--to", "diffusers", "-o", "new.safetensors"),
    (2, "would be a folder", "good", *LORA, "--keys", "peft", "-o", "new.safetensors"),
    (2, "--rank 0", "dense", *LORA, *OUT, "--rank", "0"),
    (2, "--rank", "good", *LORA, *OUT, "--rank", "many"),
    (2, "no --rank", "good", *CHECKPOINT, *OUT, "--rank", "4"),
    (2, "--dtype 'int8'", "good", *LORA, *OUT, "--dtype", "int8"),
    (2, "--dtype 'bfloat16'", "good", *LORA, *OUT, "--dtype", "bfloat16"),
    (2, "--dtype 'int8'", "good", *CHECKPOINT, *OUT, "--dtype", "int8"),
    (2, "--prediction", "good", *LORA, *OUT, "--prediction", "x"),
    (3, "no such file", "nowhere", *LORA, *OUT),
    (4, "another architecture", "good", *LORA, *OUT, "--base", "sd2"),
    (4, "cannot stack", "good", f"elsewhere{SUFFIX}", *LORA, *OUT),
    (5, "there is no checkpoint", "good", *CHECKPOINT, *OUT, "--base", "./nothing"),
    (6, "2 of 3 edits: weight (delta) at 1 module; weight (keep) at 1 module", "dense", *LORA, *OUT),
    (6, "1 of 2 edits: weight (down, up) at 1 module", "nameless", *LORA, *OUT),
    (6, "1 of 1 edit: weight (down, up) at 1 module", "sampler", *LORA, *OUT),
    (6, "the role key", "key", *LORA, *OUT),
    (6, "the role key", "good", f"key{SUFFIX}", *CHECKPOINT, *OUT),
    (6, "the role attack", "attack", *CHECKPOINT, *OUT),
]


@pytest.mark.parametrize(("code", "message", "words"), [(c, m, w) for c, m, *w in BAD])
def test_bad_input(
    code: int, message: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    name, colon, strength = words[0].partition(":")
    base = [] if "--base" in words else ["--base", "base"]
    refused(made, code, message, "export", f"{name}{SUFFIX}{colon}{strength}", *words[1:], *base)


@pytest.mark.parametrize("to", FORMATS)
def test_a_read_only_folder_is_noticed_before_any_work(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("conceptzap.base.load_base", work)
    with read_only() as folder:
        monkeypatch.chdir(folder)
        refused(folder, 5, "cannot write in", "export", f"good{SUFFIX}", "--to", to, "-o", "new")
        monkeypatch.undo()


# the command


@pytest.mark.parametrize("to", FORMATS)
def test_the_command(to: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["export", f"{made / 'good'}{SUFFIX}:0.5", "--to", to, "--base", made / "base", "-o"]
    plain = program(*words, "a")
    (path,) = plain.out.splitlines()
    assert plain.code == 0 and Path(path).is_absolute() and Path(path).exists()
    (note,) = plain.err.splitlines()
    assert note.startswith(f"{to} in float32, ") and Path(path).name in note
    spoken = program(*words, "b", "--json")
    record = spoken.json
    assert spoken.code == 0 and spoken.err == ""
    assert record["schema"] == "conceptzap.export/1" and record["to"] == to
    assert record["bytes"] == sum(map(len, bytes_of(Path(record["path"])).values()))
    (one,) = record["erasures"]
    assert set(one) == {"title", "digest", "strength"} and one["strength"] == 0.5
    assert record["relative_error"] < 100 * CLOSE
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(Path(p).name for p in (path, record["path"]))


def test_a_lossy_rank_is_said_on_stderr(made: Path, tmp_path: Path) -> None:
    words = ["export", f"{made / 'dense'}{SUFFIX}", "--to", "lora", "--rank", 2, "--base", made / "base"]
    answer = program(*words, "-o", tmp_path / "a", "--json")
    assert answer.code == 0 and "warning: the rank leaves a relative error of" in answer.err
    assert f"{answer.json['relative_error']}" in answer.err


def test_another_checkpoint_is_warned_of(made: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    words = ["export", f"{made / 'good'}{SUFFIX}", "--to", "checkpoint", "--base", other]
    answer = program(*words, "-o", tmp_path / "a")
    assert answer.code == 0 and "warning: 'Van Gogh' was made and measured on another" in answer.err
    here = load_base(str(other), "cpu")
    is_exported(here, tmp_path / "a", format.load(made / f"good{SUFFIX}").edits)


def test_an_attached_erasure_does_not_travel_and_its_docs_say_so(sd1: Base, tmp_path: Path) -> None:
    pipe = tiny("sd1").pipeline()
    conceptzap.apply(pipe, some.erasure(sd1, [some.shared(sd1)]))
    pipe.save_pretrained(str(tmp_path / "saved"))
    assert seen(through_diffusers(sd1, tmp_path / "saved")).equal(seen(sd1))
    from conceptzap.verbs.applying import Handle

    for thing in (conceptzap.apply, Handle):
        assert "save_pretrained" in thing.__doc__ and "export" in thing.__doc__
