"""Erasures by their names on the hub: what is fetched, what is not, and what is said when it fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import conceptzap, refused
from hub_server import Hub, the_hub  # noqa: F401
from huggingface_hub import constants

import conceptzap as cz
from conceptzap import format
from conceptzap.errors import FormatError, ResourceError, UsageError
from conceptzap.format import naming, remote

NAME = "hf://someone/erasures/church"
FILE = "church.lprompt.safetensors"
REPO = "someone/erasures"


@pytest.fixture
def shared(the_hub: Hub, church: Path) -> Hub:  # noqa: F811
    """A hub with one erasure, among things that nobody may fetch."""
    others = {"README.md": b"#", "pytorch_model.bin": b"\x80\x04", "lora.safetensors": b"no"}
    the_hub.put(REPO, {FILE: church.read_bytes(), **others})
    return the_hub


@pytest.fixture
def closed(shared: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return shared


@pytest.mark.parametrize(
    ("name", "place"),
    {
        "hf://u/r/a": ("u/r", "a.lprompt.safetensors", None),
        "hf:/u/r/a": ("u/r", "a.lprompt.safetensors", None),  # what a Path makes of it
        "hf://u/r/a.lprompt@v1": ("u/r", "a.lprompt.safetensors", "v1"),
        "hf://u/r/a.lprompt.safetensors@refs/pr/1": ("u/r", "a.lprompt.safetensors", "refs/pr/1"),
        "hf://u/r@v1/styles/a.key": ("u/r", "styles/a.key.lprompt.safetensors", "v1"),
    }.items(),
)
def test_what_a_name_means(name: str, place: tuple[str, str, str | None]) -> None:
    assert remote.is_name(name) and remote.is_name(Path(name))
    assert remote.parse(name) == remote.parse(Path(name)) == remote.Place(*place)


@pytest.mark.parametrize(
    "name",
    ["hf://", "hf://a", "hf://a/b", "hf://a/b/", "hf://a/b/../c", "hf://a/b/./c", "hf://a/b//c", "hf://a/b/c@",
     "hf://a/b@v1/c@v2", "hf://a--b/c/d", "hf://.a/b/c", "hf://a/b.git/c", "hf://ä/b/c", "hf://a/b/c d@e f",
     "hf://a/b/c:d", "hf://a/b/c\\d", "hf://a/b/model.safetensors"],
)  # fmt: skip
def test_malformed_names_are_usage_errors(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        naming.existing(name)
    assert caught.value.hint and "\n" not in str(caught.value)
    refused(tmp_path, 2, "hf://", "inspect", name)


@pytest.mark.parametrize("name", ["hf", "hf:x", "hf.safetensors", "./hf://u/r/a", "HF://u/r/a", "hf:///u/r/a"])
def test_other_names_are_of_this_disk(name: str) -> None:
    assert not remote.is_name(name)


def test_it_is_fetched_once_and_by_itself(shared: Hub, church: Path) -> None:
    path = naming.existing(NAME)
    assert path.read_bytes() == church.read_bytes() and path.name == FILE
    assert shared.asked.count(f"GET /{REPO}/resolve/main/{FILE}") == 1
    assert naming.existing(f"{NAME}.lprompt.safetensors@main") == path
    assert sum(line.startswith("GET") for line in shared.asked) == 1, shared.asked
    assert all(line.endswith(FILE) for line in shared.asked)


def test_every_way_of_naming_it(shared: Hub, church: Path, tmp_path: Path) -> None:
    commit = shared.repos[REPO].branches["main"]
    digest = format.read_header(church).digest
    for name in (NAME, Path(NAME), f"{NAME}@{commit}", f"hf://{REPO}@{commit}/church"):
        assert cz.load(name).digest == digest
    assert cz.inspect(NAME).digest == cz.stack([NAME, church]).digest == digest
    assert conceptzap("inspect", NAME, "--json").json["files"][0]["digest"] == digest
    assert conceptzap("cite", NAME).code == 0
    assert conceptzap("stack", NAME, church, "-o", tmp_path / "both", "--json").json["digest"] == digest


def test_it_is_drawn_with(shared: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    words = ("--base", tiny_folder, "--steps", 1, "-o", tmp_path / "a.png", "--json")
    answer = conceptzap("generate", "a church", "--with", f"{NAME}:0.5", *words)
    assert answer.code == 0, answer
    assert answer.json["images"][0]["erasures"][0]["strength"] == 0.5
    refused(tmp_path, 2, "not a number", "generate", "a church", "--with", f"{NAME}:x")
    refused(tmp_path, 2, "--with", "generate", NAME)


def test_a_newer_revision_is_fetched_and_an_old_commit_stays(shared: Hub, sd1: cz.Base, church: Path) -> None:
    from erasures import nudge

    old, first = naming.existing(NAME), shared.repos[REPO].branches["main"]
    shared.put(REPO, {FILE: format.dumps(nudge(sd1, "church", 0.03))})
    assert cz.load(NAME).digest != cz.load(f"{NAME}@{first}").digest == cz.load(old).digest


def test_what_was_fetched_once_works_without_the_hub(closed: Hub, church: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="not in the cache, and the hub cannot be reached"):
        naming.existing(NAME)
    assert closed.asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fetched = naming.existing(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = list(closed.asked)
    assert naming.existing(NAME) == fetched and closed.asked == asked
    refused(fetched.parent, 5, "not in the cache", "inspect", f"{NAME}@v2")


@pytest.mark.parametrize("broken", [500, 503])
def test_a_hub_that_is_out_of_order(shared: Hub, broken: int, tmp_path: Path) -> None:
    fetched, shared.broken = naming.existing(NAME), broken
    assert naming.existing(NAME) == fetched
    asked = len(shared.asked)
    refused(tmp_path, 5, "cannot be reached", "inspect", f"{NAME}@v2")
    assert len(shared.asked) - asked <= 2, "asked once, each time: nobody waits for a second answer"


def test_a_commit_that_is_here_is_not_asked_for(shared: Hub) -> None:
    commit = shared.repos[REPO].branches["main"]
    fetched = naming.existing(f"{NAME}@{commit}")
    asked = len(shared.asked)
    assert naming.existing(f"{NAME}@{commit}") == fetched and len(shared.asked) == asked


def test_what_the_hub_does_not_have(shared: Hub, tmp_path: Path) -> None:
    for name in ("hf://someone/else/church", "hf://someone/erasures/cat", f"{NAME}@v9"):
        refused(tmp_path, 3, "the hub has no hf://someone/", "inspect", name)


def test_what_the_hub_does_not_give(shared: Hub, tmp_path: Path) -> None:
    shared.repos[REPO].gated = True
    refused(tmp_path, 5, "closed to you", "inspect", NAME)


def test_a_file_that_is_no_erasure_is_refused_and_not_kept(shared: Hub, church: Path, tmp_path: Path) -> None:
    good = church.read_bytes()
    for bad in (b"", b"\x80\x04pickle", good[:-1] + bytes([good[-1] ^ 1])):
        shared.put(REPO, {FILE: bad})
        with pytest.raises(FormatError, match=NAME):
            naming.existing(NAME)
        assert not list(Path(constants.HF_HUB_CACHE).rglob(FILE))
    shared.put(REPO, {FILE: good})
    assert naming.existing(NAME).read_bytes() == good


def test_a_copy_that_was_damaged_here_is_fetched_anew(shared: Hub, church: Path) -> None:
    path = naming.existing(NAME)
    path.resolve().write_bytes(church.read_bytes()[:-1] + b"x")
    with pytest.raises(FormatError):
        cz.load(NAME)
    assert naming.existing(NAME).read_bytes() == church.read_bytes()


def test_nothing_large_is_fetched(shared: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptzap.format.container.FILE_LIMIT", 100)
    with pytest.raises(FormatError, match="too large"):
        naming.existing(NAME)
    assert not [line for line in shared.asked if line.startswith("GET")]


def test_a_policy_names_it_by_its_commit(shared: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    commit = shared.repos[REPO].branches["main"]
    held = cz.lock(NAME, tmp_path / "a.lock", base=tiny_folder)
    assert [one.path for one in held.files] == [f"hf://{REPO}/{FILE}@{commit}"]
    assert cz.verify(tmp_path / "a.lock").files == held.files
    (tmp_path / "b.lock").write_text((tmp_path / "a.lock").read_text().replace(commit, "f" * 40))
    refused(tmp_path, 6, "the hub has no", "verify", tmp_path / "b.lock")


def test_the_program_tells_nobody_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    assert conceptzap("methods").code == 0 and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
