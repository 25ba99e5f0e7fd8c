"""`erase --after`: what is installed is in force while the new erasure is learned, and kept by digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edits as some
import pytest
import torch
from small import settings

import conceptzap
from conceptzap import format
from conceptzap.base import Base
from conceptzap.errors import SilentEditError, UsageError
from conceptzap.runtime.attach import attached, edits_on, installed, installed_on
from conceptzap.training import dictionary, neighbours, objectives, states
from conceptzap.verbs import planning


def test_what_is_installed_acts_alone_and_with_what_is_attached(base: Base) -> None:
    old, new = some.shared(base), some.low_rank(base)
    plain, alone, both = (some.eps(base, some.ASKED, edits) for edits in ([], [old], [old, new]))
    with installed(base.unet, [old]):
        assert installed_on(base.unet) == (old,)
        assert torch.equal(some.eps(base, some.ASKED), alone)
        assert torch.equal(some.eps(base, some.ASKED, [new]), both)
        with installed(base.unet, [new]):
            assert installed_on(base.unet) == (old, new) and torch.equal(some.eps(base, some.ASKED), both)
        assert torch.equal(some.eps(base, some.ASKED), alone)
    assert torch.equal(some.eps(base, some.ASKED), plain) and not some.hooks(base)
    assert not installed_on(base.unet)


def test_it_is_whole_again_after_an_error(sd1: Base) -> None:
    old, new = some.shared(sd1), some.low_rank(sd1)
    with pytest.raises(SilentEditError), installed(sd1.unet, [old]), attached(sd1.unet, [new]):
        pass
    with pytest.raises(ZeroDivisionError), installed(sd1.unet, [old]):
        with pytest.raises(RuntimeError), attached(sd1.unet, [new]):
            raise RuntimeError
        assert edits_on(sd1.unet) == (old,)
        raise ZeroDivisionError
    assert edits_on(sd1.unet) is None and not some.hooks(sd1)


def test_edits_confined_to_rows_leave_what_is_installed_alone(sd1: Base) -> None:
    old, new = some.shared(sd1), some.low_rank(sd1)
    cond, x = sd1.encode(["a cat", "a dog"]), sd1.noise([1, 2])
    with attached(sd1.unet, [old]):
        without = sd1.eps(x, 500, cond)
    with installed(sd1.unet, [old]), attached(sd1.unet, [new], torch.tensor([[1.0, 0.0]])):
        found = sd1.eps(x, 500, cond)
    assert torch.allclose(found[1], without[1], atol=1e-6) and not torch.allclose(found[0], without[0])


def test_nothing_that_is_kept_for_the_base_is_taken_under_what_is_installed(sd1: Base) -> None:
    """Words, states and dictionaries are learned once a base; under other edits they are others."""
    text, recipe = some.in_text(sd1), dictionary.Recipe(2, 4, 3, 32, 2, 0.01)
    key, words = dictionary._key(sd1, "unet.up_blocks.1", recipe), neighbours._vocabulary(sd1, None)[1]
    with states.shared():
        plain = states.States.of(sd1, ["a cat"]).hidden
        with installed(sd1, [text]):
            read = states.States.of(sd1, ["a cat"]).hidden
            assert not torch.equal(read, plain) and not torch.equal(neighbours._vocabulary(sd1, None)[1], words)
            assert dictionary._key(sd1, "unet.up_blocks.1", recipe) != key
        assert torch.equal(states.States.of(sd1, ["a cat"]).hidden, plain)
    assert torch.equal(neighbours._vocabulary(sd1, None)[1], words)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, sd1: Base) -> list[Path]:
    folder = tmp_path_factory.mktemp("before")
    paths = [folder / f"{name}{format.SUFFIX}" for name in ("a", "b")]
    for path, edit in zip(paths, (some.shared(sd1), some.low_rank(sd1)), strict=True):
        format.save(some.erasure(sd1, [edit]), path)
    return paths


def erase(base: Base, output: Path, **request: Any) -> Any:
    given = {"anchors": "dog", "keep": ["horse"], "base": base, "preview": False, "method": "cidm"}
    given["overrides"] = settings("cidm", gate=False)
    return conceptzap.erase("cat", output=output, **given | request)


def test_the_file_says_what_it_comes_after_and_is_made_again(
    files: list[Path], sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "DENOISING", 3)
    made = erase(sd1, tmp_path / "one", after=files)
    (record,) = made.erasure.header.made
    assert record["after"] == sorted(format.read_header(path).digest for path in files)
    again = erase(sd1, tmp_path / "two", after=[str(path) for path in reversed(files)])
    assert again.digest == made.digest and again.path.read_bytes() == made.path.read_bytes()
    free = erase(sd1, tmp_path / "free")
    assert "after" not in free.erasure.header.made[0] and free.erasure.edits != made.erasure.edits
    assert not made.erasure.header.parents  # it is a file by itself, not a stack


def test_a_method_that_never_runs_the_model_refuses_it(files: list[Path]) -> None:
    with pytest.raises(UsageError, match="uce never runs the model"):
        planning.resolve("cat", method="uce", after=files)


def test_a_stopped_run_goes_on_after_the_same_files(files: list[Path]) -> None:
    plan = planning.resolve("cat", anchors="dog", method="esd", after=files[0])
    assert f"--after {files[0]}" in plan.resume_command()
    assert plan.record()["after"] == [format.read_header(files[0]).digest]
