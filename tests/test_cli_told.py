"""What commands tell that only look: inspect, methods, presets, doctor."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import conceptzap
from samples import header, rich, small

from conceptzap import format, methods
from conceptzap.cli import _errors
from conceptzap.edit import Erasure
from conceptzap.registry import catalog, config, family
from conceptzap.verbs import planning


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# inspect


def test_inspect_says_what_is_in_a_file(here: Path) -> None:
    digest = format.save(rich(), here / "a.lprompt.safetensors")
    answer = conceptzap("inspect", "a.lprompt.safetensors", "--json")
    assert answer.code == 0 and answer.err == ""
    assert answer.json["schema"] == "conceptzap.inspect/1"
    (one,) = answer.json["files"]
    assert one["path"] == str(here / "a.lprompt.safetensors")
    assert one["digest"] == digest and one["bytes"] == (here / "a.lprompt.safetensors").stat().st_size
    assert {"title", "concepts", "anchors", "base", "method", "edits", "scores", "parents"} <= set(one)
    for edit in one["edits"]:
        assert {"op", "sites", "slots", "gates", "scale", "role"} <= set(edit)
    table = conceptzap("inspect", "a.lprompt.safetensors")
    assert table.code == 0 and digest in table.out and "Van Gogh" in table.out


def test_a_bad_file_among_several_is_reported_and_the_others_shown(here: Path) -> None:
    format.save(small(), here / "a.lprompt.safetensors")
    answer = conceptzap("inspect", "nowhere", "a.lprompt.safetensors")
    assert answer.code == 3 and "Van Gogh" in answer.out
    assert answer.err.startswith("error: no such file: nowhere") and answer.err.count("\n") == 1
    spoken = conceptzap("inspect", "a.lprompt.safetensors", "nowhere", "--json")
    assert spoken.code == 3 and len(spoken.json["files"]) == 1
    assert spoken.json["error"]["code"] == 3


def test_names_from_files_cannot_draw_on_the_terminal(here: Path) -> None:
    evil = "\x1b[2J[bold red]\u202egoG naV"
    made = Erasure(header(title=evil, concepts=(evil,)), small().edits)
    format.save(made, here / "a.lprompt.safetensors")
    out = conceptzap("inspect", "a.lprompt.safetensors").out
    assert "[bold red]goG naV" in out
    assert "\x1b" not in out and "\u202e" not in out


@pytest.mark.parametrize("columns", [20, 40, 59])
def test_on_a_narrow_terminal_no_word_is_broken(
    columns: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    answer = conceptzap("methods")
    assert answer.code == 0, answer
    out = answer.out
    words = {word for m in catalog.methods() for word in m["summary"].split() if len(word) < columns}
    assert words <= set(out.split())
    format.save(rich(), here / "a.lprompt.safetensors")
    facts = conceptzap("inspect", "a").out
    assert re.search(r"^size: \d+ k?B", facts, re.MULTILINE) and "effect: erases" in facts


# methods, presets, doctor


def test_methods_and_their_settings() -> None:
    names = [m["name"] for m in conceptzap("methods", "--json").json["methods"]]
    assert names == list(family.members("methods"))
    for name in names:
        (found,) = conceptzap("methods", name, "--json").json["methods"]
        assert found["summary"] and found["settings"]
        fields = family.load("methods", name).Config.__dataclass_fields__
        assert [s["name"] for s in found["settings"]] == list(fields)


def test_presets_are_sound() -> None:
    found = {p["name"]: p for p in conceptzap("presets", "--json").json["presets"]}
    assert {"style", "object", "person", "unsafe", "paper"} <= set(found)
    for name in found:
        table = config.preset(name)
        assert set(table) <= {
            "summary", "kind", "names", "anchor", "anchors", "keep", "methods", "method", "harden",
        }  # fmt: skip
        assert table.get("method", methods.DEFAULT) in family.members("methods")
        assert table.get("harden") in (None, *planning.BUDGETS)
        words = config.kept_words(table)
        assert table["summary"] and len(words) == len(set(words))
        for method, chosen in table.get("methods", {}).items():
            config.resolve(family.load("methods", method).Config, chosen)
        assert conceptzap("presets", name).out.startswith(name)


def test_what_is_read_of_a_method_is_what_it_has() -> None:
    for name in family.members("methods"):
        real, read = family.load("methods", name).Config, catalog.settings(name)
        assert typing.get_type_hints(read) == typing.get_type_hints(real)
        assert dataclasses.asdict(read()) == dataclasses.asdict(real())


def test_doctor(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(here / "cache"))
    (here / "cache" / "pictures").mkdir(parents=True)
    (here / "cache" / "pictures" / "state").write_bytes(bytes(5000))
    found = conceptzap("doctor", "--json").json
    assert found["cache"]["bytes"]["pictures"] == 5000 and "cpu" in found["devices"]
    assert conceptzap("doctor", "--clear", "--json").json["cleared"] == 5000
    assert found["offline"] is True and found["problems"] == []


def test_doctor_knows_what_works_offline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))
    kinds = {"model": "model_index.json", "text": "config.json", "zap": "a.lprompt.safetensors"}
    for name, file in ((f"some--{kind}", file) for kind, file in kinds.items()):
        commit = here / f"models--{name}" / "snapshots" / ("0" * 40)
        commit.mkdir(parents=True)
        (commit / file).write_bytes(bytes(70))
    assert conceptzap("doctor", "--json").json["downloaded"] == {"some/model": 70, "some/zap": 70}
    assert re.search(r"some/model +70 bytes", conceptzap("doctor").out)


def test_doctor_warns_of_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    answer = conceptzap("doctor")
    assert answer.code == 0 and answer.err == "warning: only 3.0 MB of disk are free; make room\n"


def test_doctor_says_so_of_a_home_that_cannot_be_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").touch()
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(here / "file" / "cache"))
    problem = conceptzap("doctor", "--json").json["problems"]
    assert len(problem) == 1 and "cannot be written" in problem[0] and "CONCEPTZAP_CACHE" in problem[0]


def test_doctor_shows_what_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptzap.base.devices.available", lambda: ["cuda:0", "cpu"])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (3 * 10**9, 8 * 10**9))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some GPU")
    assert re.search(r"cuda:0 +Some GPU, 3.0 GB of 8.0 GB free", conceptzap("doctor").out)


def test_one_line_is_one_line() -> None:
    assert _errors.one_line("a\r\n\tb\x1b\u202e\udcff") == "a b\\x1b\\u202e\\udcff"
