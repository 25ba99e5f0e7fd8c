"""The cache folder: where it is, and that clearing it removes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from conceptzap.format import cache


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path / "here"))
    assert cache.root() == tmp_path / "here"
    monkeypatch.delenv("CONCEPTZAP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache.root() == tmp_path / "xdg" / "conceptzap"


def test_clearing_leaves_everything_that_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CONCEPTZAP_CACHE", str(tmp_path))
    (tmp_path / "thesis.txt").write_text("mine")
    run = cache.folder("pictures") / "one"
    run.mkdir(parents=True)
    (run / "state").write_bytes(bytes(1000))
    (run / "link").symlink_to(tmp_path / "thesis.txt")
    assert cache.sizes()["pictures"] >= 1000
    assert cache.clear() >= 1000
    assert sum(cache.sizes().values()) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_unknown_kind_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="no kind of cache"):
        cache.folder("..")
