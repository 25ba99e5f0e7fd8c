"""What the package promises to whoever imports it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import conceptzap

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.mark.parametrize("name", conceptzap.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(conceptzap, name) is not None
    assert name in dir(conceptzap)


@pytest.mark.parametrize("name", [n for n in conceptzap.__all__ if n != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(conceptzap, name).__doc__ or "").strip()


def test_the_promised_names() -> None:
    promised = {
        "erase", "load", "save", "stack", "generate", "apply", "export", "inspect", "Edit", "Gate",
        "Erasure", "Header", "Task", "Settings", "ConceptZapError", "__version__",
    }  # fmt: skip
    assert promised <= set(conceptzap.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'erasee'"):
        conceptzap.erasee  # noqa: B018


def test_importing_costs_nothing() -> None:
    code = "import sys, conceptzap; print(sorted({'torch', 'numpy', 'rich', 'typer'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_one_version() -> None:
    assert "version" in tomllib.loads(PROJECT.read_text())["project"]["dynamic"]
    assert conceptzap.__version__.count(".") == 2


def test_python_m_is_the_same_program() -> None:
    command = [sys.executable, "-m", "conceptzap", "--version"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.startswith(f"conceptzap {conceptzap.__version__} ")
