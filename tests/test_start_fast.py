"""What needs no model never imports one. How long a start takes: `tests/benchmarks/start.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from samples import rich

from conceptzap import format
from conceptzap.registry import family

HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "safetensors", "jinja2", "huggingface_hub")
REPORT = f"""
import sys
from conceptzap.cli import main
code = main(sys.argv[1:])
# typer loads pydantic to read values; what other packages bring is looked for where a member is asked for
heavy = {HEAVY} + ("pydantic", "importlib.metadata") * ("--help" in sys.argv)
print(sorted(set(heavy) & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The program, which says last which heavy modules it has imported."""
    command = [sys.executable, "-c", REPORT, *words]
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


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_it_starts_without_torch(words: list[str], folder: Path) -> None:
    done = run(words, folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ["erase", ""],
        ["erase", "cat", "--set", "stepz=1"],
        ["erase", "cat", "--steps", "0"],
        ["generate"],
        ["generate", "a cat", "-o", "a.jpg"],
        ["stack", "nowhere", "-o", "x"],
        ["stack", "nowhere"],
        ["erase", "cat", "--anchor", "--dry-run"],
        ["nothing"],
    ],
    ids=" ".join,
)
def test_bad_input_is_answered_without_torch(words: list[str], folder: Path) -> None:
    done = run(words, folder)
    assert done.returncode in (2, 3), done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_plan_needs_no_torch(folder: Path) -> None:
    done = run(["erase", "cat", "--preset", "style", "--steps", "7", "--dry-run"], folder)
    assert done.returncode == 0 and done.stderr.splitlines() == ["[]"]


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
    done = run([], folder)
    assert done.returncode == 0 and done.stdout.split() == found
    assert done.stderr.splitlines() == ["[]"]
