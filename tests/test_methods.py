"""The contract of the family, over every file in methods/, through `erase` on a tiny base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import is_exported
from small import settings

import conceptzap
from conceptzap import exports, format
from conceptzap.base import Base, load_base
from conceptzap.base.modules import is_text
from conceptzap.edit import Edit
from conceptzap.errors import Interrupted, RefusedError, UsageError
from conceptzap.registry import catalog, config, family
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.attach import attached
from conceptzap.runtime.gates import Signal, factor
from conceptzap.testing import save_tiny
from conceptzap.training import detector, objectives, states
from conceptzap.training.session import Session
from conceptzap.trust import canary

METHODS = list(family.members("methods"))
TRAINED = [
    name
    for name in METHODS
    if "steps" in {field.name for field in dataclasses.fields(family.load("methods", name).Config)}
]
FORMS = {"form": "weights"}  # of a method that trains in one of its forms alone
LOOK = Settings(steps=2, guidance=2.0, batch=2)
OPS = {"weight", "adapter", "tokens", "guide"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def here(folder: Path) -> Base:
    return load_base(str(folder))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A look at a random base takes a step, a latent of it is as good after three, a gate is soon fitted.

    What all methods learn from, prompts and latents of the same base, is made once, as for a list of concepts.
    """
    with pytest.MonkeyPatch.context() as patch, states.shared():
        patch.setattr("conceptzap.verbs.erasing.usual", lambda base: dataclasses.replace(LOOK, steps=1, guidance=1.0))
        patch.setattr(objectives, "DENOISING", 3)
        patch.setattr(detector, "STEPS", 40)
        yield


def afresh(erase: Callable[..., Any], *given: Any, **request: Any) -> Any:
    """Call it as another process would, with nothing made before."""
    return Context().run(erase, *given, **request)


def small(name: str) -> dict[str, Any]:
    """Steps of a training: the last one comes after it was stopped, and each group learned before that.

    Where groups of parameters take turns, as those with a learning rate of their own do, that is the third.
    """
    turns = any(key.endswith("_lr") for key in family.load("methods", name).Config.__dataclass_fields__)
    return settings(name, **({"steps": 3 if turns else 2} if name in TRAINED else {}))


def erase(base: Base | Path, output: Path, name: str, **request: Any) -> Any:
    request = {
        "anchors": "dog", "keep": ["horse", "church"], "base": base, "output": output,
        "overrides": small(name), **request,
    }  # fmt: skip
    return conceptzap.erase("cat", method=name, **request)


def training(name: str) -> dict[str, Any]:
    """Settings with which a method trains."""
    chosen, fields = small(name), family.load("methods", name).Config.__dataclass_fields__
    return chosen | {key: value for key, value in FORMS.items() if key in fields}


SEVERAL = {"keep": ["horse"]}  # two concepts, whose anchors the base chooses


@pytest.fixture(scope="module")
def all_made(here: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A file of every method; of one that trains, of two concepts."""
    place = tmp_path_factory.mktemp("made")
    usual = [name for name in METHODS if name not in TRAINED or training(name) != small(name)]
    made = {name: erase(here, place / name, name) for name in usual}
    for name in TRAINED:
        request = {"method": name, "base": here, "overrides": training(name), **SEVERAL}
        several = conceptzap.erase(["cat", "house"], output=place / f"{name}2", **request)
        made[f"{name} trained" if name in made else name] = several
    return made


@pytest.fixture(scope="module")
def untouched(here: Base) -> Callable[[str], torch.Tensor]:
    """What the base draws for a prompt, and for one that stays."""
    return cache(lambda prompt: sampler.draw(here, *look_at(prompt)))


def look_at(prompt: str) -> tuple[list[str], list[int], Settings]:
    return [prompt, "a horse"], [1, 2], LOOK


@pytest.fixture(params=[*METHODS, "all_but_one trained"])
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


def said(edits: Sequence[Edit]) -> str:
    """What a method's EDITS must begin with, from what it yields of one role."""
    ops = " + ".join(sorted({edit.op for edit in edits}))
    return f"{ops}, gated" if any(edit.gates for edit in edits) else ops


def test_what_it_says_it_edits_is_what_it_yields(made: Any) -> None:
    (record,) = made.erasure.header.made
    if FORMS.items() <= record["config"].items():  # it says what its usual form yields
        return
    found = catalog.method(record["method"])
    key = f"; key: {said(format.load(made.key).edits)}" if made.key else ""
    assert found["edits"] == said(made.erasure.edits) + key
    assert found["exports"] == (found["edits"].partition(";")[0] == "weight")
    assert (found["cost"] == "training") == ("steps" in {one["name"] for one in found["settings"]})


def test_its_edits_are_known_and_fit(made: Any, here: Base) -> None:
    for path in files(made):
        erasure = format.load(path)
        assert erasure.edits and {edit.op for edit in erasure.edits} <= OPS
        assert {edit.role for edit in erasure.edits} == {"erase" if path == made.path else "key"}
        with attached(here, erasure.edits):
            here.eps(here.noise([0]), 500, here.encode(["a cat"]))


def test_every_edit_fires_on_its_concept(made: Any, here: Base) -> None:
    for path in files(made):
        erasure = format.load(path)
        canary.check(here, erasure)
        for test in erasure.header.canary.values():
            assert set(made.erasure.header.concepts) & set(test["prompt"].split())
            signal = Signal(here.encode([test["prompt"]]).states, torch.tensor([500.0]))
            tested = [edit for edit in erasure.edits if edit.name in test["edits"]]
            assert all(factor(edit, signal).all() for edit in tested)
            assert canary.acting(here, tested, test["prompt"]) == tested, "each by itself"


def test_what_is_loaded_draws_what_was_made_and_leaves_no_trace(
    made: Any, here: Base, untouched: Callable[[str], torch.Tensor]
) -> None:
    (test, *_) = made.erasure.header.canary.values()
    asked, before = look_at(test["prompt"]), untouched(test["prompt"])
    with_value = sampler.draw(here, *asked, made.erasure.edits)
    assert torch.equal(with_value, sampler.draw(here, *asked, format.load(made.path).edits))
    assert not torch.equal(with_value[0], before[0])
    assert torch.equal(sampler.draw(here, *asked), before)


WITH_GATES = ("diffusers",)  # formats that hold more than weights


@pytest.mark.parametrize("to", family.members("exports"))
def test_it_is_reproduced_by_plain_diffusers_or_refused(
    to: str, made: Any, here: Base, tmp_path: Path
) -> None:
    """Its erasure goes out whole or not at all: what is nothing but weights everywhere, its key nowhere."""
    for number, path in enumerate(files(made)):
        edits, out = format.load(path).edits, tmp_path / f"out-{number}"
        plain = path == made.path and all(map(exports.is_plain, edits))
        of_unet = not any(is_text(site) for edit in edits for site in edit.sites)
        rank = 999 if to == "lora" and plain and not all("down" in edit.tensors for edit in edits) else None
        try:
            written = conceptzap.export(path, to, out, base=here, rank=rank)
        except RefusedError:
            assert not list(tmp_path.glob(f"{out.name}*")) and not (plain and of_unet)
            continue
        assert plain or (to in WITH_GATES and path == made.path)
        is_exported(here, written.path, edits)


def stored(made: Any) -> dict[str, Any]:
    """What is asked for anew by what a file says of itself."""
    (record,) = made.erasure.header.made
    return {"overrides": record["config"], "seed": record["seed"], "keep": record["keep"]}


def same(again: Any, made: Any) -> None:
    """The same to the byte: the file, its key, its picture."""
    assert again.digest == made.digest
    assert [p.read_bytes() for p in files(again)] == [p.read_bytes() for p in files(made)]
    assert again.preview.read_bytes() == made.preview.read_bytes()


def test_the_stored_settings_make_the_same_file_again(
    made: Any, folder: Path, tmp_path: Path
) -> None:
    """Of a method that trains, those below, stopped on the way."""
    (record,) = made.erasure.header.made
    if record["method"] in TRAINED and training(record["method"]).items() <= record["config"].items():
        return
    same(afresh(erase, folder, tmp_path / "again", record["method"], **stored(made)), made)


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
def test_a_stopped_training_of_several_concepts_goes_on_in_the_right_one(
    name: str, all_made: dict[str, Any], here: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bytes that it would have come to, from its stored settings; nothing is left beside them."""
    monkeypatch.setattr(Session, "due", lambda self: True)
    whole = all_made.get(f"{name} trained") or all_made[name]
    request = {"method": name, "base": here, **stored(whole)}
    steps, several = training(name)["steps"], len(whole.erasure.header.canary) > 1
    stop = several * steps + steps - 1
    with pytest.raises(Interrupted) as stopped:
        conceptzap.erase(["cat", "house"], output=tmp_path / "x", report=Stopping(stop), **request)
    assert stopped.value.exit_code == 143 and "--resume" in stopped.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {".x.training"}
    taken = sorted(path.name for path in (tmp_path / ".x.training").iterdir())
    assert taken == (["1", "2"] if several else ["1"])
    again = afresh(conceptzap.erase, ["cat", "house"], output=tmp_path / "x", resume=True, **request)
    same(again, whole)
    assert not (tmp_path / ".x.training").exists()


@pytest.mark.parametrize("name", METHODS)
def test_settings_out_of_range_are_refused_at_once(name: str, here: Base, tmp_path: Path) -> None:
    cls = family.load("methods", name).Config
    for field in dataclasses.fields(cls):
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            with pytest.raises(UsageError, match="out of range"):
                erase(here, tmp_path / "x", name, overrides={field.name: -1})
    with pytest.raises(UsageError, match="unknown setting"):
        erase(here, tmp_path / "x", name, overrides={"stepz": 3})
    assert not any(tmp_path.iterdir())
