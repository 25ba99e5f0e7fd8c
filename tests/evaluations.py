"""What several tests of `evaluate` share: the words of a cheap run."""

from __future__ import annotations

from pathlib import Path

import stub_judges  # noqa: F401  (named on the command line)
from command import Answer, conceptzap

CHEAP = ("--limit", 2, "--steps", 1, "--batch", 8)
STUB = ("--judge", "stub_judges:by_brightness")
ANY = ("--fail-under", "E=0")  # a concept that is still drawn is no failure


def evaluate(file: Path, folder: Path, out: Path, *more: object) -> Answer:
    """The imagenette suite in a second: two pictures a slice, one step, a judge without a network."""
    words = ("evaluate", file, "--base", folder, "--suite", "imagenette", *STUB, *CHEAP, *ANY, "-o", out)
    return conceptzap(*words, *more)
