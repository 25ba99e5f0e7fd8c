"""What needs no model never imports one. How long a start takes: `tests/benchmarks/start.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from samples import rich

from conceptzap import format
from conceptzap.registry import family

HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "safetensors", "jinja2", "huggingface_hub")
REPORT = f"""
import json, sys
from conceptzap.cli import main
told = []
for words in json.loads(sys.argv[1]):
    code = main(words)
    # typer loads pydantic to read values; what other packages bring is looked for where a member is asked for
    heavy = {HEAVY} + ("pydantic", "importlib.metadata") * ("--help" in words)
    told.append([code, sorted(set(heavy) & set(sys.modules))])
print(json.dumps(told), file=sys.stderr)
sys.exit(code)
"""


def run(folder: Path, *asked: list[str]) -> subprocess.CompletedProcess[str]:
    """The program, once or again and again; last it says what it ended with and had imported each time."""
    command = [sys.executable, "-c", REPORT, json.dumps(asked)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


COMMANDS = [
    ["--help"],
    ["--version"],
    ["methods"],
    ["presets", "--json"],
    ["inspect", "a.lprompt.safetensors"],
    ["inspect", "a.lprompt.safetensors", "--json"],
    *([name, "--help"] for name in family.files("cli")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fast")
    format.save(rich(), path / "a.lprompt.safetensors")
    return path


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, list[object]]:
    """One process that runs them all, helps first: what one imports is there for those behind it."""
    asked = sorted([*COMMANDS, *BAD], key=lambda words: "--help" not in words)
    answers = json.loads(run(folder, *asked).stderr.splitlines()[-1])
    return {" ".join(words): answer for words, answer in zip(asked, answers, strict=True)}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_it_starts_without_torch(words: list[str], told: dict[str, list[object]]) -> None:
    assert told[" ".join(words)] == [0, []]


BAD = [
    ["erase", ""],
    ["erase", "cat", "--set", "stepz=1"],
    ["erase", "cat", "--steps", "0"],
    ["generate"],
    ["generate", "a cat", "-o", "a.jpg"],
    ["stack", "nowhere", "-o", "x"],
    ["stack", "nowhere"],
    ["erase", "cat", "--anchor", "--dry-run"],
    ["nothing"],
]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_answered_without_torch(words: list[str], told: dict[str, list[object]]) -> None:
    code, heavy = told[" ".join(words)]
    assert code in (2, 3) and heavy == []


def test_a_plan_needs_no_torch(folder: Path) -> None:
    done = run(folder, ["erase", "cat", "--preset", "style", "--steps", "7", "--dry-run"])
    assert done.returncode == 0 and done.stderr.splitlines() == ["[[0, []]]"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("erase cat --method ", sorted(family.members("methods"))),
        ("erase cat --preset sty", ["style"]),
        ("inspect ", ["a.lprompt.safetensors"]),
        ("generate cat --with a.", ["a.lprompt.safetensors"]),
        ("gene", ["generate"]),
    ],
)
def test_completion_needs_no_torch(
    line: str, found: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"conceptzap {line}"
    monkeypatch.setenv("_CONCEPTZAP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    done = run(folder, [])
    assert done.returncode == 0 and done.stdout.split() == found
    assert done.stderr.splitlines() == ["[[0, []]]"]


def test_a_command_is_built_alone() -> None:
    """Reading the options of all of them is most of a start."""
    from conceptzap import cli

    assert list(cli.program("cite").commands) == ["cite"]
    assert set(cli.program().commands) == set(family.files("cli"))
