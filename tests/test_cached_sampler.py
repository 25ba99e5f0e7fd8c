"""Pictures of probes in the cache: drawn once, shared, damaged ones drawn again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from erasures import nudge

from conceptzap.base import Base
from conceptzap.evaluation import cached, observing
from conceptzap.evaluation.cached import CachedSampler
from conceptzap.report import Report
from conceptzap.result import Probe, Settings


def some(count: int, slice: str = "keep/unrelated") -> tuple[Probe, ...]:
    return tuple(Probe(slice, f"a cat {i}", i) for i in range(count))


def test_batches_are_drawn_once_and_read_back_bit_for_bit(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = CachedSampler(sd1, Settings(steps=1, batch=2), nudge(sd1, "cat").edits, tmp_path)
    first = list(sampler.batches(some(5)))
    assert [len(batch.probes) for batch in first] == [2, 2, 1] and sampler.count(some(5)) == 3
    monkeypatch.setattr(cached, "drawings", lambda *_: pytest.fail("drawn again"))
    for kept, drawn in zip(sampler.batches(some(5)), first, strict=True):
        assert np.array_equal(kept.pictures, drawn.pictures) and kept.fired == drawn.fired
        assert all(kept.fired)


def test_a_damaged_batch_is_drawn_again(sd1: Base, tmp_path: Path) -> None:
    sampler = CachedSampler(sd1, Settings(steps=1, batch=2), (), tmp_path)
    drawn = sampler.batch(some(2))
    path = sampler.path(some(2))
    path.write_bytes(path.read_bytes()[:-20])
    assert np.array_equal(sampler.batch(some(2)).pictures, drawn.pictures)
    assert len(path.read_bytes()) > 20


def test_what_a_picture_depends_on_is_in_its_key(sd1: Base, tmp_path: Path) -> None:
    def path(settings: Settings, edits: tuple = (), asked: tuple[Probe, ...] = some(2)) -> Path:
        return CachedSampler(sd1, settings, edits, tmp_path, "digest").path(asked)

    plain = Settings(steps=1, batch=2)
    edits = nudge(sd1, "cat").edits
    half = tuple(edit.scaled(0.5) for edit in edits)
    paths = [
        path(plain), path(Settings(steps=2, batch=2)), path(Settings(steps=1, batch=4)),
        path(plain, edits), path(plain, half), path(plain, asked=some(1)),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert path(plain, tuple(edit.scaled(0) for edit in edits)) == path(plain), "strength 0 is the base"
    assert path(plain, asked=some(2, "erase/seen")) == path(plain), "slices share pictures"


def test_identical_is_measured_one_by_one(sd1: Base, tmp_path: Path) -> None:
    settings = Settings(steps=1, batch=4)
    bare = CachedSampler(sd1, settings, (), tmp_path)
    nudged = CachedSampler(sd1, settings, nudge(sd1, "cat", 5.0).edits, tmp_path)
    assert observing.identical(bare, bare, some(4), 3, Report()) == (True, True, True)
    assert observing.identical(bare, nudged, some(4), 3, Report()) == (False, False, False)
