"""The contract of the family, over every file in methods/, through `erase` on a tiny base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import settings

import conceptzap
from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.errors import Interrupted, UsageError
from conceptzap.registry import config, family
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.attach import attached
from conceptzap.runtime.gates import Signal, factor
from conceptzap.testing import save_tiny
from conceptzap.training import objectives
from conceptzap.training.session import Session
from conceptzap.trust import canary

METHODS = list(family.members("methods"))
TRAINED = [
    name
    for name in METHODS
    if "steps" in {field.name for field in dataclasses.fields(family.load("methods", name).Config)}
]
LOOK = Settings(steps=2, guidance=2.0)
OPS = {"weight", "adapter", "tokens"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def here(folder: Path) -> Base:
    return load_base(str(folder))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A look at a random base takes a few steps, a latent of it is as good after three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conceptzap.verbs.erasing.usual", lambda base: LOOK)
        patch.setattr(objectives, "DENOISING", 3)
        yield


def erase(folder: Path, output: Path, name: str, **request: Any) -> Any:
    request = {
        "anchors": "dog", "keep": ["horse", "church"], "base": str(folder), "output": output,
        "overrides": settings(name), **request,
    }  # fmt: skip
    return conceptzap.erase("cat", method=name, **request)


@pytest.fixture(scope="module")
def all_made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("made")
    return {name: erase(folder, place / name, name) for name in METHODS}


@pytest.fixture(params=METHODS)
def made(request: pytest.FixtureRequest, all_made: dict[str, Any]) -> Any:
    return all_made[request.param]


def files(made: Any) -> list[Path]:
    return [path for path in (made.path, made.key) if path]


def test_a_member_says_what_it_is() -> None:
    for name in METHODS:
        member, said = family.load("methods", name), family.describe("methods", name)
        assert said["summary"].endswith(".") and said["paper"] == member.PAPER
        assert member.Config.__dataclass_params__.frozen
        assert member.Config() == config.resolve(member.Config)


def test_its_edits_are_known_and_fit(made: Any, here: Base) -> None:
    for path in files(made):
        erasure = format.load(path)
        assert erasure.edits and {edit.op for edit in erasure.edits} <= OPS
        assert {edit.role for edit in erasure.edits} == {"erase" if path == made.path else "key"}
        with attached(here.unet, erasure.edits):
            here.eps(here.noise([0]), 500, here.encode(["a cat"]))


def test_every_edit_fires_on_its_concept(made: Any, here: Base) -> None:
    for path in files(made):
        erasure = format.load(path)
        canary.check(here, erasure)
        for test in erasure.header.canary.values():
            assert "cat" in test["prompt"].split()
            signal = Signal(here.encode([test["prompt"]]).states, torch.tensor([500.0]))
            for edit in (edit for edit in erasure.edits if edit.name in test["edits"]):
                assert factor(edit, signal).all() and canary.make(here, [edit], test["prompt"])


def test_what_is_loaded_draws_what_was_made_and_leaves_no_trace(made: Any, here: Base) -> None:
    (test, *_) = made.erasure.header.canary.values()
    asked = ([test["prompt"], "a horse"], [1, 2], LOOK)
    before = sampler.draw(here, *asked)
    with_value = sampler.draw(here, *asked, made.erasure.edits)
    assert torch.equal(with_value, sampler.draw(here, *asked, format.load(made.path).edits))
    assert not torch.equal(with_value[0], before[0])
    assert torch.equal(sampler.draw(here, *asked), before)


def test_the_stored_settings_make_the_same_file_again(
    made: Any, folder: Path, tmp_path: Path
) -> None:
    stored = made.erasure.header.made[0]
    again = erase(
        folder, tmp_path / "again", stored["method"], overrides=stored["config"],
        seed=stored["seed"], keep=stored["keep"],
    )  # fmt: skip
    assert again.digest == made.digest
    assert [p.read_bytes() for p in files(again)] == [p.read_bytes() for p in files(made)]
    assert again.preview.read_bytes() == made.preview.read_bytes()


class Stopping(Report):
    """Stops the training like a signal does, after `step` steps in all."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def progress(self, events: Any) -> Iterator[Any]:
        import os
        import signal

        for event in events:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield event


@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_erasure_goes_on_to_the_same_bytes(
    name: str, folder: Path, tmp_path: Path, all_made: dict[str, Any]
) -> None:
    with pytest.raises(Interrupted) as stopped:
        erase(folder, tmp_path / "x", name, report=Stopping(2))
    assert stopped.value.exit_code == 143 and "--resume" in stopped.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [".x.training"]
    again = erase(folder, tmp_path / "x", name, resume=True)
    whole = all_made[name]
    assert [p.read_bytes() for p in files(again)] == [p.read_bytes() for p in files(whole)]
    assert not (tmp_path / ".x.training").exists()


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_of_several_concepts_goes_on_in_the_right_one(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(Session, "due", lambda self: True)
    steps = settings(name)["steps"]
    request = {"method": name, "base": str(folder), "overrides": settings(name), "keep": ["horse"]}
    whole = conceptzap.erase(["cat", "house"], output=tmp_path / "whole", **request)
    stop = steps + 1 if len(whole.erasure.header.canary) > 1 else 1
    with pytest.raises(Interrupted):
        conceptzap.erase(["cat", "house"], output=tmp_path / "x", report=Stopping(stop), **request)
    taken = sorted(path.name for path in (tmp_path / ".x.training").iterdir())
    assert taken == (["1", "2"] if stop > steps else ["1"])
    again = conceptzap.erase(["cat", "house"], output=tmp_path / "x", resume=True, **request)
    assert again.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_settings_out_of_range_are_refused_at_once(name: str, folder: Path, tmp_path: Path) -> None:
    cls = family.load("methods", name).Config
    for field in dataclasses.fields(cls):
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            with pytest.raises(UsageError, match="out of range"):
                erase(folder, tmp_path / "x", name, overrides={field.name: -1})
    with pytest.raises(UsageError, match="unknown setting"):
        erase(folder, tmp_path / "x", name, overrides={"stepz": 3})
    assert not any(tmp_path.iterdir())
