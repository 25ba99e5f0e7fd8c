"""`stack --elastic`: each file acts as far as a prompt comes near its concepts, in any order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import edits as some
import pytest
import torch
from small import settings

import conceptzap
from conceptzap import api, format
from conceptzap.base import Base
from conceptzap.errors import RefusedError, UsageError
from conceptzap.result import Settings
from conceptzap.runtime.gates import Signal, factor
from conceptzap.training import lessons
from conceptzap.trust import canary


@pytest.fixture(scope="module")
def files(sd1: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two concepts by a method that acts on every prompt."""
    folder, made = tmp_path_factory.mktemp("files"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conceptzap.verbs.erasing.usual", lambda base: Settings(steps=2, guidance=2.0))
        for concept, anchor in (("cat", "dog"), ("church", "house")):
            request = {"anchors": anchor, "keep": ["horse"], "base": sd1, "preview": False}
            one = conceptzap.erase(
                concept, method="uce", overrides=settings("uce"), output=folder / concept, **request
            )
            made.append(one.path)
    return made


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random base does not tell a concept from very many prompts."""

    def sides(told: list[lessons.Lesson], _: int) -> list[list[str]]:
        name = told[0].concept
        prompts = [name, f"a {name}"], ["", "a horse", told[0].anchor]
        return [[prompt for prompt in one for _ in "ab"] for one in prompts]

    monkeypatch.setattr(lessons, "sides", sides)


def eps(base: Base, prompt: str, edits: tuple = ()) -> torch.Tensor:
    return some.eps(base, [prompt], edits)


def test_each_file_acts_on_what_is_its_own(files: list[Path], sd1: Base, tmp_path: Path) -> None:
    made = api.stack_files(files, tmp_path / "all", base=sd1, elastic=True)
    again = api.stack_files(files[::-1], tmp_path / "again", base=sd1, elastic=True)
    assert made.digest == again.digest
    whole, (cat, church) = format.load(made.path), [format.load(path) for path in files]
    canary.check(sd1, whole)
    assert set(made.header.parents) == {cat.digest, church.digest} and not made.header.scores
    assert eps(sd1, "", whole.edits).equal(eps(sd1, ""))  # where the paper would share out the whole of it
    for edit in whole.edits:
        (near,) = edit.gates
        assert near.kind == "similar" and near.params["power"] == 4.0
    for prompt, own in (("a cat", cat), ("a church", church)):
        signal = Signal(sd1.encode([prompt]).states, torch.zeros(1))
        levels = [factor(edit, signal).item() for edit in whole.edits]
        mine = {edit.tensors["down"].sum().item() for edit in own.edits}
        assert all(
            level > 0.5 for edit, level in zip(whole.edits, levels, strict=True)
            if edit.tensors["down"].sum().item() in mine
        )  # fmt: skip
        open_ = [replace(e, gates=(), scale=s) for e, s in zip(whole.edits, levels, strict=True)]
        assert some.far(eps(sd1, prompt, whole.edits), eps(sd1, prompt, tuple(open_))) < 1e-4


def test_what_is_gated_stays_as_it_is_and_texts_are_refused(
    files: list[Path], sd1: Base, tmp_path: Path
) -> None:
    gated, text = some.erasure(sd1), some.erasure(sd1, [some.in_text(sd1)])
    for name, one in (("gated", gated), ("text", text)):
        format.save(one, tmp_path / f"{name}{format.SUFFIX}")
    made = api.stack_files([tmp_path / "gated", files[0]], tmp_path / "x", base=sd1, elastic=True)
    assert {edit.name for edit in gated.edits} < {edit.name for edit in format.load(made.path).edits}
    with pytest.raises(RefusedError, match="changes the text encoder"):
        api.stack_files([tmp_path / "text", files[0]], tmp_path / "y", base=sd1, elastic=True)
    assert not list(tmp_path.glob("y*"))


def test_it_needs_a_base(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a base"):
        api.stack_files(files, tmp_path / "all", elastic=True)
    assert not list(tmp_path.iterdir())
