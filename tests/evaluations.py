"""What several tests of `evaluate` share: bases, a file, an empty cache, the words of a cheap run."""

from __future__ import annotations

from pathlib import Path

import pytest
import stub_judges  # noqa: F401  (named on the command line)
from command import Answer, conceptzap
from erasures import write

from conceptzap.base import Base, load_base
from conceptzap.terminal.environment import DEMO, DEMO_UNET
from conceptzap.testing import save_tiny

CHEAP = ("--limit", 2, "--steps", 1, "--batch", 8)
STUB = ("--judge", "stub_judges:by_brightness")


def evaluate(file: Path, folder: Path, out: Path, *more: object) -> Answer:
    """The imagenette suite in a second: two pictures a slice, one step, a judge without a network."""
    words = ("evaluate", file, "--base", folder, "--suite", "imagenette", *STUB, *CHEAP, "-o", out)
    return conceptzap(*words, *more)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that every picture of a test is its own."""
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny sd1 as a folder for `--base`."""
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def church(sd1: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure made for it."""
    return write(sd1, "church", tmp_path_factory.mktemp("erasure"))


@pytest.fixture(scope="session")
def demo_base() -> Base:
    """The built-in checkpoint."""
    if not DEMO_UNET.is_file():
        pytest.skip("the built-in checkpoint is not there")
    return load_base(str(DEMO))
