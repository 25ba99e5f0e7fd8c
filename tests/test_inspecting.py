"""What `inspect` says of checkpoints, LoRAs and whole folders, and what `generate` alone offers."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import ldm
import pytest
import torch
from command import conceptzap
from safetensors.torch import save_file
from samples import rich

import conceptzap as library
from conceptzap import format
from conceptzap.testing import save_tiny, tiny

SUFFIX = ".lprompt.safetensors"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only(*words: object) -> dict:
    """The one model that `inspect --json` tells of."""
    answer = conceptzap("inspect", *words, "--json")
    assert answer.code == 0 and answer.json["files"] == [], answer
    (model,) = answer.json["models"]
    return model


def test_a_checkpoint_folder(here: Path) -> None:
    save_tiny(here / "base")
    model = only("base")
    assert (model["kind"], model["family"], model["prediction"]) == ("checkpoint", "sd1", "epsilon")
    assert set(model["parts"]) == {"unet", "vae", "text_encoder"} and model["erased"] == {}
    assert model["bytes"] == sum(model["parts"].values()) == sum(
        path.stat().st_size for path in (here / "base").rglob("*.safetensors")
    )
    shown = conceptzap("inspect", "base").out
    assert "sd1" in shown and "epsilon" in shown and "nothing, as far as it says" in shown
    assert conceptzap("-q", "inspect", "base").out == f"{here / 'base'}\n"


def test_what_is_erased_in_a_baked_folder(here: Path) -> None:
    save_tiny(here / "base")
    note = {"schema": "conceptzap.baked/1", "concepts": ["Van Gogh"], "anchors": [""],
            "erasures": [{"digest": "ab" * 32, "title": "Van Gogh"}], "base": {}}  # fmt: skip
    (here / "base" / "conceptzap.json").write_text(json.dumps(note))
    assert only("base")["erased"] == {key: note[key] for key in ("concepts", "anchors", "erasures")}
    assert "Van Gogh (abababababab)" in conceptzap("inspect", "base").out
    (here / "base" / "conceptzap.json").write_text('{"concepts": [1], "erasures": 3}')
    assert only("base")["erased"] == {}


def test_a_checkpoint_file(here: Path) -> None:
    ldm.write(tiny("sd1", clip=True), here / "one.safetensors")
    model = only("one")
    assert (model["kind"], model["family"], model["prediction"]) == ("checkpoint", "sd1", "epsilon")
    assert set(model["parts"]) == {"unet", "vae", "text_encoder"}
    assert model["bytes"] == (here / "one.safetensors").stat().st_size


def test_a_lora(here: Path) -> None:
    name = "lora_unet_down_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.lora_down.weight": torch.ones(2, 8)}
    said = {"ss_base_model_version": "sdxl_base_v1-0",
            "conceptzap": json.dumps({"concepts": ["church"], "erasures": [{"digest": "cd" * 32}]})}  # fmt: skip
    save_file(tensors, here / "style.safetensors", said)
    model = only("style")
    assert (model["kind"], model["family"], model["parts"]) == ("LoRA", "sdxl", {"unet": 128})
    assert model["erased"]["concepts"] == ["church"]
    (seen,) = library.examine("style")
    assert isinstance(seen, library.Model) and seen.kind == "LoRA"


def test_what_is_neither(here: Path) -> None:
    save_file({"weight": torch.ones(2)}, here / "plain.safetensors")
    (here / "text.safetensors").write_bytes(b"\xff" * 40)
    (here / "empty").mkdir()
    os.mkfifo(here / "pipe")
    for name in ("plain", "text", "empty", "pipe"):
        assert conceptzap("inspect", name).code == 3, name


def test_a_damaged_erasure_is_not_taken_for_anything_else(here: Path) -> None:
    format.save(rich(), here / f"a{SUFFIX}")
    data = (here / f"a{SUFFIX}").read_bytes()
    (here / f"a{SUFFIX}").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert conceptzap("inspect", "a").code == 3


def test_a_folder_of_erasures(here: Path) -> None:
    (here / "files").mkdir()
    for name in ("b", "a"):
        format.save(rich(), here / "files" / f"{name}{SUFFIX}")
    answer = conceptzap("inspect", "files", "--json").json
    paths = [str(here / "files" / f"{name}{SUFFIX}") for name in ("a", "b")]
    assert [one["path"] for one in answer["files"]] == paths and "models" not in answer
    shown = conceptzap("inspect", "files").out.splitlines()
    assert [line.split()[0] for line in shown if SUFFIX in line] == [f"files/{n}{SUFFIX}" for n in "ab"]
    (here / "files" / f"c{SUFFIX}").write_bytes(b"no")
    bad = conceptzap("inspect", "files", "--json")
    assert bad.code == 3 and len(bad.json["files"]) == 2 and "error" in bad.json
    assert len(library.examine("files/a")) == 1


def test_a_key_restores_and_erases_nothing(here: Path) -> None:
    made = rich()
    edits = tuple(dataclasses.replace(edit, role="erase") for edit in made.edits)
    for name, role in (("a", "erase"), ("a.key", "key")):
        one = dataclasses.replace(made, edits=tuple(dataclasses.replace(edit, role=role) for edit in edits))
        format.save(format.seal(one), f"{name}{SUFFIX}")
    answer = conceptzap("inspect", ".")
    erased, key = sorted(line for line in answer.out.splitlines() if SUFFIX in line)
    assert answer.code == 0 and "(restores " in erased + key and "warning" not in answer.err
    assert ("(restores " in erased) != ("(restores " in key)
    assert "overlaps" not in conceptzap("inspect", ".", "--json").json


def test_closing_figures_are_in_percent(here: Path) -> None:
    leak = {"value": 0.125, "low": 0.043, "high": 0.31, "n": 24, "better": "lower", "seeds": [0]}
    made = rich()
    head = dataclasses.replace(made.header, scores={"leak": leak, "other": leak})
    format.save(format.seal(dataclasses.replace(made, header=head)), f"a{SUFFIX}")
    shown = [line.split() for line in conceptzap("inspect", "a").out.splitlines()]
    assert "still shown (leak) 12.5 % 4.3 - 31.0 % 24".split() in shown
    assert "other 0.125 0.043 - 0.31 24".split() in shown


def test_generate_alone_says_what_is_here(here: Path) -> None:
    bare = conceptzap("generate")
    assert bare.code == 2 and 'conceptzap generate "a cat"' in bare.error
    format.save(rich(), here / f"mine{SUFFIX}")
    (here / f"broken{SUFFIX}").write_bytes(b"no")
    some = conceptzap("generate")
    assert some.code == 2 and "here: mine; for example: conceptzap generate" in some.error
    assert "--with mine --compare" in some.error
    assert "--with mine" in conceptzap("generate", "--json").json["error"]["hint"]
