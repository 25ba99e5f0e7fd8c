"""Plans: all that `erase` will use, said and checked before anything is loaded."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from command import conceptzap as command

import conceptzap
from conceptzap import format
from conceptzap.errors import UsageError
from conceptzap.verbs import planning


def erase(base: Path, *concepts: str, **request: Any) -> Any:
    request = {"method": "uce", "keep": ["horse"], "base": str(base), **request}
    return conceptzap.erase(concepts, **request)


def test_a_plan_says_all_that_will_be_used_and_writes_nothing(tmp_path: Path) -> None:
    planned = planning.resolve("cat", preset="style", steps=7, method="zap", output=tmp_path / "x")
    record = planned.record()
    assert (record["anchors"], record["kinds"]) == (["painting"], ["style"])
    assert record["config"]["steps"] == 7 and record["output"].endswith(f"x{format.SUFFIX}")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("taken", ["x.lprompt.safetensors", "x.key.lprompt.safetensors", "x.png"])
def test_no_target_may_exist(taken: str, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        erase(tiny_folder, "cat", output=tmp_path / "x")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"steps": 3}, "no optimisation steps"),
        ({"method": "zap", "steps": 0}, "--steps 0 is out of range"),
        ({"method": "zapp"}, "no method is called"),
        ({"preset": "styel"}, "no preset"),
        ({"overrides": {"rnak": 3}}, "unknown setting"),
        ({"seed": -1}, "--seed -1"),
        ({"anchors": ["a", "b"]}, "2 anchors for 1 concepts"),
        ({"anchors": "CAT"}, "both"),
    ],
)
def test_a_request_that_cannot_be_meant(
    request_: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        erase(tiny_folder, "cat", output=tmp_path / "x", **request_)
    assert not any(tmp_path.iterdir())


def test_the_resume_command_is_the_request_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_own_words", lambda base: {})  # as on a base that is not here
    given = {
        "anchors": ["", "a man's hat"], "keep": ["@home"], "preset": "person", "method": "zap",
        "overrides": {"lr": "1e-3"}, "seed": 4, "force": True, "output": tmp_path / "a b",
    }  # fmt: skip
    planned = planning.resolve(["-x-", "Bob"], **given)
    words = shlex.split(planned.resume_command())
    assert words[:2] == ["conceptzap", "erase"] and words[-4:] == ["--resume", "--", "-x-", "Bob"]
    pairs = list(zip(words[2::1], words[3::1], strict=False))
    for pair in (
        ("--anchor", ""), ("--anchor", "a man's hat"), ("--keep", "@@home"), ("--set", "lr=1e-3"),
        ("--preset", "person"), ("--seed", "4"), ("--output", str(tmp_path / "a b")),
    ):  # fmt: skip
        assert pair in pairs
    assert "--force" in words and "--base" not in words
    answer = command(*words[1:-4], "--dry-run", "--json", *words[-3:])
    told = answer.json
    assert answer.code == 0 and "estimate" in told  # which is of the runs before, not of the request
    assert told == {"schema": "conceptzap.plan/1", **planned.record(), "estimate": told["estimate"]}


def test_a_default_keep_list_is_not_part_of_the_command() -> None:
    assert "--keep" not in planning.resolve("cat", method="zap", preset="style").resume_command()


@pytest.mark.parametrize(("words", "unknown"), [("zebra", "zebra"), ("a photo of a zebra", "zebra")])
def test_a_plan_knows_the_words_of_a_base_on_this_disk(words: str, unknown: str) -> None:
    """Without torch: `test_start_fast` runs the same in a process of its own."""
    with pytest.raises(UsageError, match=f"demo does not know '{words}'.*{unknown}") as error:
        planning.resolve(words)
    assert "eseburger" not in error.value.hint
    with pytest.raises(UsageError, match="does not know 'zebra'"):
        planning.resolve("cat", anchors="zebra")
    planning.resolve("zebra", base="somebody/else")
