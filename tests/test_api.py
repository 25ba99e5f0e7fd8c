"""The verbs beyond what every method promises: plans, refusals, what is kept when something fails."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import conceptzap as command
from PIL import Image
from small import settings

import conceptzap
from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.edit import Erasure
from conceptzap.errors import (
    ConceptZapError,
    Interrupted,
    MismatchError,
    RefusedError,
    ResourceError,
    ThresholdError,
    UsageError,
)
from conceptzap.evaluation.closing import Closing
from conceptzap.format import atomic
from conceptzap.report import Report
from conceptzap.result import Score, Settings
from conceptzap.testing import save_tiny, tiny
from conceptzap.trust import admission, guard
from conceptzap.verbs import erasing, planning, preview

pytestmark = pytest.mark.usefixtures("few_steps")
LOOK = {"steps": 2, "guidance": 2.0}


class Heard(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conceptzap.verbs.erasing.usual", lambda base: Settings(**LOOK))
        for word in ("cat", "house"):
            erase(folder, word, output=folder / word)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptzap.verbs.erasing.usual", lambda base: Settings(**LOOK))


@pytest.fixture(scope="module")
def here(world: Path) -> Base:
    return load_base(str(world / "base"))


def erase(world: Path, *concepts: str, **request: Any) -> Any:
    request = {"method": "uce", "keep": ["horse"], "base": str(world / "base"), **request}
    return conceptzap.erase(concepts, **request)


def file(world: Path, word: str) -> Path:
    return world / f"{word}{format.SUFFIX}"


def draw(here: Base, *erasures: Any, prompts: Any = "a cat", **more: Any) -> list[Any]:
    return list(conceptzap.generate(prompts, erasures=erasures, base=here, **LOOK, **more))


# the task and what the base knows


@pytest.mark.parametrize("role", ["concept", "anchor"])
def test_what_the_base_cannot_know_is_answered_with_what_it_does(
    role: str, world: Path, tmp_path: Path
) -> None:
    words = {"concept": "catt", "anchor": "cat"}
    request = {} if role == "concept" else {"anchors": "catt"}
    concept = words["concept"] if role == "concept" else "house"
    with pytest.raises(UsageError, match="does not know 'catt'") as error:
        erase(world, concept, output=tmp_path / "x", **request)
    assert error.value.exit_code == 2 and "did you mean cat" in error.value.hint
    with pytest.raises(UsageError, match="tokens long"):
        erase(world, " ".join(["cat"] * 30), output=tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_the_keep_set(here: Base) -> None:
    heard = Heard()

    def keep(**request: Any) -> Any:
        return erasing.fitting_task(here, planning.resolve("monet", **request), heard)

    style = keep(anchors="painting")
    assert style.kinds == ("style",) and "house" in style.keep
    assert "monet" not in {word.lower() for word in style.keep}  # what goes is not what stays
    assert all(not here.unknown_words(word) for word in style.keep)
    assert keep(preset="paper", method="uce").keep == () and heard.notes == []
    assert keep(keep=["cat", "zebra"]).keep == ("cat",)
    assert "does not know 'zebra'" in heard.notes[0]


# erase to its end


def test_what_is_made(world: Path) -> None:
    info = conceptzap.inspect(file(world, "cat"))
    made = format.load(file(world, "cat"))
    assert info.digest == made.digest and info.header.made[0]["config"]["rank"]
    assert {str(t.dtype) for edit in made.edits for t in edit.tensors.values()} == {"torch.float16"}
    assert (world / "cat.png").is_file() and not list(world.glob(".*"))
    start, _, data = made.header.thumbnail.partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert start == "data:image/webp;base64" and picture.size == (128, 64)


def test_a_leak_is_exit_7_with_what_was_made(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak = {"leak": Score("leak", 0.9, 0.8, 1.0, 20, "lower")}
    monkeypatch.setattr("conceptzap.verbs.erasing.closing", lambda *_: Closing(leak))
    with pytest.raises(ThresholdError, match="not erased: 90% of 20") as error:
        erase(world, "cat", output=tmp_path / "x")
    made = error.value.made
    assert made.path.is_file() and made.scores == leak and str(made.path) in str(error.value)
    stored = format.read_header(made.path).header.scores["leak"]
    assert (stored["value"], stored["n"], stored["seeds"]) == (0.9, 20, [0])


def test_nothing_is_written_when_anything_before_that_fails(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise ResourceError("no more memory")

    monkeypatch.setattr(preview, "draw", fail)
    with pytest.raises(ResourceError):
        erase(world, "cat", output=tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_says_what_is_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = atomic.write_atomic

    def full(path: Path, data: bytes, force: bool = False) -> None:
        if path.suffix == ".png":
            raise ResourceError("no space", "make room")
        write(path, data, force)

    monkeypatch.setattr(atomic, "write_atomic", full)
    with pytest.raises(ResourceError, match="written before that: .*x.lprompt") as error:
        erase(world, "cat", output=tmp_path / "x")
    assert error.value.hint == "make room"
    assert [path.name for path in tmp_path.iterdir()] == [f"x{format.SUFFIX}"]


# trainings


def train(world: Path, output: Path, **request: Any) -> Any:
    small = settings("esd", steps=2, trajectories=2, batch=1)
    return erase(world, "cat", method="esd", overrides=small, output=output, **request)


@pytest.mark.parametrize(
    ("blow", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["int", "term"]
)
def test_stopped_after_training_it_says_how_to_go_on(
    blow: BaseException, code: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise blow

    with monkeypatch.context() as patch:
        patch.setattr("conceptzap.verbs.erasing.closing", stop)
        with pytest.raises(Interrupted, match="the training is kept in") as error:
            train(world, tmp_path / "x")
    assert error.value.exit_code == code and "--resume" in error.value.hint
    if code != 130:  # it goes on in the same way, however it was stopped
        return
    heard = Heard()
    made = train(world, tmp_path / "x", resume=True, report=heard)
    assert "taking up the training at step 2" in heard.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.lprompt.safetensors", "x.png"]
    heard = Heard()
    anew = train(world, tmp_path / "x", resume=True, report=heard, force=True)
    assert any("nothing to take up" in note for note in heard.notes) and anew.digest == made.digest


def test_an_old_training_is_dropped_and_strange_files_stay(world: Path, tmp_path: Path) -> None:
    left = tmp_path / ".x.training" / "7" / "step-000009"
    left.mkdir(parents=True)
    (tmp_path / ".x.training" / "mine.txt").write_text("mine")
    erase(world, "cat", output=tmp_path / "x")
    kept = [path.name for path in (tmp_path / ".x.training").iterdir()]
    assert kept == ["mine.txt"]


# generate


def test_one_picture_a_prompt_and_seed(here: Base, world: Path) -> None:
    drawn = draw(here, file(world, "cat"), prompts=["a cat", "a dog"], count=2, seed=5)
    assert [(p.prompt, p.seed) for p in drawn] == [
        ("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6),
    ]  # fmt: skip
    (one,) = drawn[0].erasures
    assert set(one) == {"path", "digest", "strength", "fired"} and one["fired"] is True
    assert one["path"] == str(file(world, "cat")) and len(one["digest"]) == 64
    alone = draw(here, file(world, "cat"), prompts="a dog", seed=6)[0]
    assert np.array_equal(alone.array, drawn[3].array)


def test_the_same_erasure_twice_counts_once(here: Base, world: Path) -> None:
    path = file(world, "cat")
    (once,), (twice,) = draw(here, path), draw(here, path, str(path), format.load(path))
    assert len(twice.erasures) == 1 and np.array_equal(once.array, twice.array)
    with pytest.raises(UsageError, match="at the strengths 1 and 0.5"):
        draw(here, path, (path, 0.5))


def test_order_and_stacking_make_no_difference(here: Base, world: Path, tmp_path: Path) -> None:
    a, b = file(world, "cat"), file(world, "house")
    both = conceptzap.stack([a, b])
    assert both.digest == conceptzap.save(both, tmp_path / "both")
    assert conceptzap.stack([b, a, b]).digest == both.digest
    pictures = [draw(here, *order)[0].array for order in ((a, b), (b, a), (both,))]
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])


def test_strength_nought_is_the_base(here: Base, world: Path) -> None:
    (bare,), (off,) = draw(here), draw(here, (file(world, "cat"), 0))
    assert np.array_equal(bare.array, off.array)
    assert off.erasures[0]["fired"] is False and off.erasures[0]["strength"] == 0
    for bad in (-0.1, 2.1, float("nan")):
        with pytest.raises(UsageError, match="strength"):
            conceptzap.generate("a cat", erasures=[(file(world, "cat"), bad)])


@pytest.mark.parametrize(
    "bad", [{"prompts": []}, {"count": 0}, {"seed": 2**63 - 1, "count": 2}, {"batch": 0}]
)
def test_a_bad_request_is_answered_at_the_call(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        conceptzap.generate(**{"prompts": "a cat", **bad})


@pytest.mark.parametrize("bad", [{"steps": 0}, {"guidance": float("nan")}])
def test_settings_are_checked_at_the_call(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        conceptzap.generate("a cat", **bad)


def test_another_checkpoint_warns_and_is_recorded_or_is_refused(world: Path) -> None:
    tuned, heard = tiny("sd1", seed=1), Heard()
    (picture,) = draw(tuned, file(world, "cat"), report=heard)
    assert "another checkpoint" in heard.notes[0] and "warning" in picture.text
    with pytest.raises(MismatchError, match="another checkpoint"):
        draw(tuned, file(world, "cat"), strict=True)
    with pytest.raises(MismatchError, match="another architecture"):
        draw(tiny("sd2"), file(world, "cat"))


def test_a_policy_draws_with_its_own_files_and_nothing_else(
    world: Path, here: Base, tmp_path: Path
) -> None:
    lock = guard.lock([file(world, "cat")], str(world / "base"), tmp_path / "conceptzap.lock")
    (bound,) = draw(here, policy=lock.path)
    (free,) = draw(here, file(world, "cat"))
    assert np.array_equal(bound.array, free.array) and bound.text["policy"] == lock.digest
    assert Path(bound.erasures[0]["path"]).samefile(file(world, "cat"))
    assert len(draw(here, file(world, "cat"), policy=lock.path)[0].erasures) == 1
    for odd in ((file(world, "cat"), 0.5), file(world, "house")):
        with pytest.raises(RefusedError):
            draw(here, odd, policy=lock.path)
    with pytest.raises(RefusedError):
        draw(tiny("sd1", seed=1), policy=lock.path)


def test_an_erasure_that_does_not_act_is_refused(world: Path, here: Base) -> None:
    made = format.load(file(world, "cat"))
    (name,) = made.header.canary
    wrong = {site: 2 * v for site, v in made.header.canary[name]["change"].items()}
    canary = {name: {**made.header.canary[name], "change": wrong}}
    header = replace(made.header, canary=canary)
    with pytest.raises(RefusedError, match="self-test failed"):
        draw(here, Erasure(header, made.edits))


def test_the_preview_shows_what_there_is(here: Base) -> None:
    task = conceptzap.Task(("cat",), ("dog",), (), ("object",))
    asked = preview.concept_prompts(here, task)
    assert preview._kept(here, task) == [] and len(asked) == preview.COLUMNS
    both = conceptzap.Task(("cat", "house"), ("dog",), ("tree",), ("object", "object"))
    asked = preview.concept_prompts(here, both)
    assert [sum(word in p.split() for p in asked) for word in ("cat", "house")] == [1, 1]
    assert all(isinstance(one, str) for one in preview._kept(here, both))


def test_without_a_preview_there_is_none(world: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("mine")
    made = erase(world, "cat", output=tmp_path / "x", preview=False)
    assert made.erasure.header.thumbnail == ""
    assert made.preview is None and (tmp_path / "x.png").read_text() == "mine"
    planned = planning.resolve("cat", preview=False, method="zap", output=tmp_path / "y")
    assert planned.record()["preview"] is False and "--no-preview" in planned.resume_command()
    words = ("erase", "cat", "--no-preview", "--dry-run", "--json", "-o", str(tmp_path / "z"))
    assert command(*words).json["preview"] is False
    assert command(*words, "--limit", "0").json["limit"] == 0
    assert "--limit -1 is out of range" in command(*words, "--limit", "-1").json["error"]["message"]
    unmeasured = planning.resolve("cat", limit=0, method="zap", output=tmp_path / "y")
    assert unmeasured.command().endswith("--limit 0 cat") and "--resume" in unmeasured.resume_command()


def test_it_says_what_it_did_and_how_long_and_with_how_much_memory(
    world: Path, tmp_path: Path
) -> None:
    made = erase(world, "cat", output=tmp_path / "x")
    assert list(made.phases) == ["loading", "preparing", "measuring", "drawing", "writing"]
    assert made.seconds == sum(made.phases.values()) and all(s >= 0 for s in made.phases.values())
    assert made.peak_bytes > 2**26 and made.verdict == ""
    trained = train(world, tmp_path / "y")
    assert list(trained.phases)[1:3] == ["preparing", "learning"]


def test_the_prompt_to_try_shows_the_concept_in_something(here: Base) -> None:
    style = conceptzap.Task(("van gogh",), ("painting",), (), ("style",))
    prompt = preview.telling_prompt(here, style)
    assert prompt != "van gogh" and "van gogh" in prompt and {"cat", "dog"} & set(prompt.split())
    thing = conceptzap.Task(("church",), ("house",), (), ("object",))
    assert "church" in preview.telling_prompt(here, thing)


def test_every_refusal_is_one_of_ours() -> None:
    assert issubclass(ThresholdError, ConceptZapError) and ThresholdError("x").made is None
    assert admission.MAX_STRENGTH == 2
