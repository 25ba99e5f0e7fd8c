"""The words nearest to a concept: nouns, read once a base, the same from the cache as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conceptzap.base import Base
from conceptzap.format import cache
from conceptzap.report import Report
from conceptzap.testing import tiny
from conceptzap.training import neighbours


class Counted(Report):
    """Hears what is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []

    def count(self, items, total, label):
        self.heard.append((label, total))
        yield from items


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path))
    return tmp_path


def test_they_come_nearest_first_without_the_word_itself(sd1: Base) -> None:
    near = neighbours.neighbours(sd1, "cat", ["red dog", "Cat"])
    words = [word for word, _ in near]
    assert {"dog", "horse", "church", "red dog"} <= set(words) and "cat" not in words
    assert "Cat" not in words and len(words) == len(set(words))
    cosines = [cosine for _, cosine in near]
    assert cosines == sorted(cosines, reverse=True) and all(-1.001 <= c <= 1.001 for c in cosines)


def test_the_second_concept_reads_no_word_again(
    sd1: Base, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Counted()
    before = neighbours.neighbours(sd1, "cat", report=first)
    assert first.heard == [("comparing words", -(-len(neighbours.words(sd1)) // neighbours.CHUNK))]
    second = Counted()
    assert neighbours.neighbours(sd1, "cat", report=second) == before and not second.heard
    neighbours.neighbours(sd1, "dog", report=second)
    assert not second.heard and cache.sizes()["words"] > 0


def test_another_text_encoder_has_words_of_its_own(sd1: Base, empty: Path) -> None:
    neighbours.neighbours(sd1, "cat")
    other = Counted()
    neighbours.neighbours(tiny("sd1", seed=1), "cat", report=other)
    assert other.heard and len(list(empty.glob("words/*"))) == 2


def test_a_damaged_or_unwritable_cache_costs_time_only(sd1: Base, empty: Path) -> None:
    near = neighbours.neighbours(sd1, "cat")
    (kept,) = empty.glob("words/*")
    kept.write_bytes(b"torn")
    assert neighbours.neighbours(sd1, "cat") == near
    cache.clear()
    (empty / "words").write_text("in the way")
    assert neighbours.neighbours(sd1, "cat") == near


def test_a_large_vocabulary_is_compared_by_its_nouns() -> None:
    words = neighbours.words(tiny("sd1", clip=True))
    assert {"house", "cat", "church", "Van Gogh", "pixel art"} <= set(words)
    assert not {"ing", "ers", "the", "and", "with"} & set(words)
    assert 1500 < len(words) < 3000


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_word_is_read_alike_short_and_long(family: str) -> None:
    base = tiny(family)
    alone = neighbours._read(base, ["cat"])
    beside = neighbours._read(base, ["cat", " ".join(["house"] * 30)])
    assert torch.allclose(alone[0], beside[0], atol=1e-5)
