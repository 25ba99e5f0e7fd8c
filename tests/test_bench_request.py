"""What `bench` is asked: on the command line, in a file, in both."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import refused
from test_bench import CHURCH, QUICK

from conceptzap.errors import UsageError
from conceptzap.evaluation import matrix
from conceptzap.evaluation.matrix import Job

WRONG = {
    "no method": (("--concept", "church"), "needs methods"),
    "no concept": (("--method", QUICK[0]), "needs concepts"),
    "unknown method": (("--method", "uec", *CHURCH), "no method is called 'uec'"),
    "unknown suite": (("--method", QUICK[0], *CHURCH, "--suite", "quack"), "no suite is called 'quack'"),
    "unknown setting": (("--method", QUICK[0], *CHURCH, "--set", f"{QUICK[0]}.x=1"), "unknown setting 'x'"),
    "unknown attack": (("--method", QUICK[0], *CHURCH, "--attack", "x"), "no attack is called 'x'"),
    "settings of nobody": (("--method", QUICK[0], *CHURCH, "--set", "y.x=1"), "settings of 'y'"),
    "a setting without a method": (("--method", QUICK[0], *CHURCH, "--set", "x=1"), "names no method"),
    "one name twice": (("--method", QUICK[0], "--concept", "café", "--concept", "cafe"), "called the same"),
    "an anchor that is the concept": (("--method", QUICK[0], "--concept", "cat:Cat"), "both"),
    "a limit": (("--method", QUICK[0], *CHURCH, "--limit", "0"), "--limit 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_said_before_anything_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = WRONG[name]
    refused(tmp_path, 2, message, "bench", *words)


TOML = {
    "an unknown key": ('method = ["a"]', "unknown key 'method'"),
    "another type": ('methods = "a"', "methods = 'a' is of another type"),
    "a number": ('seed = "1"', "seed = '1' is of another type"),
    "a setting": ("[set]\nx = 1", "set = {'x': 1} is of another type"),
    "no TOML": ("methods", "is not TOML"),
}


@pytest.mark.parametrize("name", TOML)
def test_a_file_that_cannot_be_meant(name: str, tmp_path: Path) -> None:
    text, message = TOML[name]
    (tmp_path / "a.toml").write_text(text)
    refused(tmp_path, 2, message, "bench", tmp_path / "a.toml", "-o", tmp_path / "out")


def test_options_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'methods = ["a"]\nconcepts = ["cat:dog"]\nseed = 3\n[set.a]\nx = 1\n', encoding="utf-8"
    )
    asked = matrix.settle(tmp_path / "a.toml", {"seed": 0, "suites": ("full",), "limit": None})
    assert (asked.seed, asked.suites, asked.settings) == (0, ("full",), {"a": {"x": 1}})
    assert asked.jobs == [Job("a", "cat", "dog")]
    with pytest.raises(UsageError, match="settings of 'a'"):
        matrix.settle(tmp_path / "a.toml", {"methods": ["b"]})
