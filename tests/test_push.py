"""Sharing an erasure: what arrives on the hub, what its card says, and what is refused before it leaves."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import conceptzap, refused
from erasures import nudge
from hub_server import TOKEN, Hub, the_hub  # noqa: F401
from PIL import Image

import conceptzap as cz
from conceptzap import format
from conceptzap.errors import ResourceError, UsageError
from conceptzap.format import container, pictures
from conceptzap.page import card

REPO = "someone/erasures"
SCORE = {"value": 0.125, "low": 0.043, "high": 0.31, "n": 24}
HOSTILE = "<script>alert(1)</script> | `x` [y](http://z)"


@pytest.fixture(scope="module")
def made(sd1: cz.Base) -> cz.Erasure:
    """An erasure with scores, a thumbnail and a method whose paper is known."""
    dots = [np.full((64, 64, 3), shade, np.uint8) for shade in (40, 200)]
    one = nudge(sd1, "Van Gogh")
    about = {"config": {}, "kinds": ["style"], "seed": 0, "versions": {"conceptzap": "0.1.0"}}
    method = {"method": "uce", **about}
    header = dataclasses.replace(
        one.header, anchors=("painting",), scores={"leak": SCORE, "preservation": SCORE}, made=(method,),
        thumbnail=pictures.thumbnail(dots),
        base=dataclasses.replace(one.header.base, id="someone/tiny", revision="0" * 40),
    )  # fmt: skip
    return format.seal(cz.Erasure(header, one.edits))


@pytest.fixture
def file(made: cz.Erasure, tmp_path: Path) -> Path:
    cz.save(made, tmp_path / "van-gogh")
    return tmp_path / "van-gogh.lprompt.safetensors"


@pytest.fixture
def hub(the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return the_hub


def front(text: str) -> dict[str, object]:
    """The card's metadata, as the hub reads it."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_what_is_pushed_is_what_others_load(hub: Hub, file: Path, made: cz.Erasure) -> None:
    done = cz.push(file, REPO, message="first")
    files = hub.newest(REPO)
    assert sorted(files) == sorted(done.files) == ["README.md", "van-gogh.lprompt.safetensors", "van-gogh.webp"]
    assert files[file.name] == file.read_bytes() and hub.messages == ["first"]
    assert done.name == f"hf://{REPO}/{file.name}@{done.commit}" and done.url == f"{hub.url}/{REPO}"
    assert cz.load(done.name).digest == cz.load(f"hf://{REPO}/van-gogh").digest == done.digest == made.digest
    assert container.split(files[file.name])[0]["modelspec.title"] == "Van Gogh"
    assert Image.open(io.BytesIO(files["van-gogh.webp"])).size == (128, 64)


def test_what_the_card_says(file: Path, made: cz.Erasure, tmp_path: Path) -> None:
    folder = cz.push(file, REPO, dry_run=True, output=tmp_path / "card").card
    text = (folder / "README.md").read_text()
    about = front(text)
    assert about["base_model"] == "someone/tiny" and about["library_name"] == "conceptzap"
    assert (about["license"], about["license_name"]) == ("other", "as-the-base")
    assert "| leak | 12.5 % | 4.3 % to 31.0 % | 24 |" in text and made.digest in text
    assert "painting" in text and "0" * 40 in text and "arXiv:2308.14761" in text and "@" in text
    assert "--with hf://someone/erasures/van-gogh" in text and '"hf://someone/erasures/van-gogh")' in text
    assert "conceptzap generate 'a cat by Van Gogh' --with" in text
    assert "does not promise" in text and "Whoever holds the weights" in text
    assert "modelspec.title" in text and (folder / "van-gogh.webp").is_file() and "van-gogh.webp" in text
    assert front(written(file, tmp_path, licence="openrail++"))["license"] == "openrail++"


def test_a_card_never_says_erased_of_what_its_figures_still_see(made: cz.Erasure, tmp_path: Path) -> None:
    scores = {"leak": {**SCORE, "value": 0.25, "high": 0.5}}
    leaky = format.seal(cz.Erasure(dataclasses.replace(made.header, scores=scores), made.edits))
    cz.save(leaky, tmp_path / "leaky")
    text = written(tmp_path / "leaky.lprompt.safetensors", tmp_path)
    assert "# Van Gogh, not erased" in text and "still show the concept in 25 % of the pictures" in text
    assert "takes **Van Gogh**" not in text


def written(file: Path, folder: Path, **given: object) -> str:
    given = {"report": cz.Report(), **given}
    done = cz.push(file, REPO, dry_run=True, output=folder / "again", force=True, **given)
    return (done.card / "README.md").read_text()


def test_its_commands_and_its_python_are_right(file: Path, tmp_path: Path) -> None:
    """They parse, and name what is there."""
    from conceptzap import cli

    text = written(file, tmp_path)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 3 and {line.split()[1] for line in lines} <= set(cli.program().commands)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert 'revision="' + "0" * 40 in code


def test_somebody_elses_words_are_shown_and_do_nothing(sd1: cz.Base, tmp_path: Path) -> None:
    one = nudge(sd1, "x")
    header = dataclasses.replace(one.header, title=HOSTILE, concepts=(HOSTILE,), anchors=("a\n# b",))
    header = dataclasses.replace(header, made=({"method": HOSTILE},))
    path = tmp_path / "odd name @ 1.lprompt.safetensors"
    cz.save(cz.Erasure(header, one.edits), path)
    text = written(path, tmp_path)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script>" not in prose and "](http://z)" not in prose and "\n# b" not in text
    assert r"\<script\>" in prose and "| `" not in re.sub(r"digest \| `[0-9a-f]{64}`", "", prose)
    assert all(line.count(" | ") <= 1 for line in prose.splitlines() if line.startswith("| concept"))
    assert "hf://someone/erasures/odd-name-1" in text


def test_the_picture_beside_the_file_is_taken_if_it_is_of_it(file: Path, made: cz.Erasure, tmp_path: Path) -> None:
    dot = np.zeros((8, 8, 3), np.uint8)
    for digest, ending in ((made.digest, "png"), ("0" * 64, "webp")):
        pictures.save_png(file.with_name("van-gogh.png"), dot, {"digest": digest}, force=True)
        assert f"van-gogh.{ending}" in written(file, tmp_path)


def test_the_command(hub: Hub, file: Path, tmp_path: Path) -> None:
    answer = conceptzap("push", file, REPO, "--private", "--revision", "v2", "--json")
    assert answer.code == 0, answer
    told = answer.json
    assert told["schema"] == "conceptzap.push/1" and told["name"].endswith(f"@{hub.repos[REPO].branches['v2']}")
    assert hub.repos[REPO].private and file.name not in hub.newest(REPO)
    assert conceptzap("push", file, REPO, "-q", "--revision", "v2").out == told["name"] + "\n"
    dry = conceptzap("push", file, REPO, "-n", "-o", tmp_path / "card")
    assert dry.out == f"{tmp_path / 'card'}\n"
    refused(tmp_path, 2, "exists", "push", file, REPO, "-n", "-o", tmp_path / "card")


def test_nothing_is_overwritten_without_force(hub: Hub, file: Path, sd1: cz.Base) -> None:
    first = cz.push(file, REPO)
    assert cz.push(file, REPO).commit == first.commit and len(hub.messages) == 1
    cz.save(nudge(sd1, "church"), file, force=True)
    with pytest.raises(UsageError, match="has another README.md"):
        cz.push(file, REPO)
    assert hub.repos[REPO].branches["main"] == first.commit
    assert cz.push(file, REPO, force=True).commit != first.commit


def test_private_is_never_public(hub: Hub, file: Path) -> None:
    hub.put(REPO, {})
    with pytest.raises(UsageError, match="is public"):
        cz.push(file, REPO, private=True)
    assert not hub.newest(REPO)


@pytest.mark.parametrize("repo", ["", "a", "a/b/c", "a b/c", "hf://a/b", "a/b.git", "../a", "a/b\n", "ä/b"])
def test_names_that_no_repository_has(repo: str, file: Path, tmp_path: Path) -> None:
    refused(tmp_path, 2, "is no repository of the hub", "push", file, repo)


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (3, "none.lprompt", ["none.lprompt.safetensors", REPO]),
        (2, "is no branch", [".", REPO, "--revision", "a b"]),
        (2, "--license", [".", REPO, "--license", "my own\n"]),
    ],
)
def test_what_else_is_refused_here(code: int, message: str, words: list[str], tmp_path: Path) -> None:
    refused(tmp_path, code, message, "push", *words)


def test_without_a_token_or_the_right_to_write(the_hub: Hub, file: Path, tmp_path: Path,  # noqa: F811
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, 5, "no token", "push", file, REPO)
    assert the_hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(tmp_path, 5, "closed to you", "push", file, REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tmp_path, 5, "nothing may leave this machine", "push", file, REPO)
    assert not the_hub.repos


def test_what_came_back_is_compared(hub: Hub, file: Path, church: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptzap.format import remote

    monkeypatch.setattr(remote, "fetch", lambda name: church)
    with pytest.raises(ResourceError, match="is not what was pushed"):
        cz.push(file, REPO)


def test_a_key_is_said_to_be_one(sd1: cz.Base, tmp_path: Path) -> None:
    one = nudge(sd1, "church")
    edits = tuple(dataclasses.replace(edit, role="key") for edit in one.edits)
    header = dataclasses.replace(one.header, canary={})
    path = tmp_path / "church.key.lprompt.safetensors"
    cz.save(cz.Erasure(header, edits), path)
    with pytest.warns(UserWarning, match="this is a key"):
        assert "**restores**" in written(path, tmp_path, report=None)


def test_markdown_of_any_text() -> None:
    assert card.plain("a|b*c_d\n<e>") == r"a\|b\*c\_d \<e\>"
