"""Members that other packages bring: found by entry points, held to the family's contract, refused aloud."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import settings

import conceptzap
from conceptzap.base import Base
from conceptzap.errors import ResourceError, UsageError
from conceptzap.evaluation import judging
from conceptzap.registry import catalog, family

OWN = {
    "methods": ("nullspace", "uce"),
    "attacks": ("other_seeds", "seeds"),
    "metrics": ("spread", "diversity"),
    "exports": ("weights", "lora"),
    "imports": ("theirs", "esd"),
}
JUDGE = '"""Says nothing."""\n\ndef load(base, option, world):\n    return (f"judge with {option}",)\n'


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python installs packages to; what lies there is seen at once."""
    monkeypatch.syspath_prepend(tmp_path)
    family._installed.cache_clear()
    yield tmp_path
    family._installed.cache_clear()


def install(site: Path, package: str, named: dict[str, dict[str, str]]) -> None:
    """A package with these entry points, group -> name -> module."""
    lines = [
        line
        for group, entries in named.items()
        for line in (f"[conceptzap.{group}]", *(f"{name} = {module}" for name, module in entries.items()))
    ]
    about = site / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(lines))
    family._installed.cache_clear()


@pytest.fixture
def guest(site: Path) -> str:
    """A package with one member of every family, each a copy of one of ours by another name."""
    folder = site / "guest_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for kind, (name, source) in OWN.items():
        shutil.copy(family.require(kind, source), folder / f"{name}.py")
    (folder / "silent.py").write_text(JUDGE)
    entries = {kind: {name: f"guest_package.{name}"} for kind, (name, _) in OWN.items()}
    install(site, "guest", {**entries, "judges": {"silent": "guest_package.silent"}})
    return "guest"


def test_every_family_takes_members_of_other_packages(guest: str) -> None:
    for kind, (name, source) in OWN.items():
        assert name in family.members(kind) and name not in family.files(kind)
        assert family.describe(kind, name) == family.describe(kind, source)
        assert family.load(kind, name).__name__ == f"guest_package.{name}"
    assert catalog.attack_names()["other-seeds"] == "other_seeds"
    assert judging.panel(["silent:x"], None, None) == ("judge with x",)


def test_a_method_of_another_package_erases(guest: str, sd1: Base, tmp_path: Path) -> None:
    given = {"base": sd1, "seed": 3, "preview": False, "limit": 0, "overrides": settings("uce")}
    made, ours = (
        conceptzap.erase("cat", method=name, output=tmp_path / name, **given) for name in ("nullspace", "uce")
    )
    assert made.erasure.header.made[0]["method"] == "nullspace"
    assert [e.name for e in made.erasure.edits] == [e.name for e in ours.erasure.edits]
    assert "nullspace" in [one["name"] for one in catalog.methods()]
    assert catalog.method("nullspace")["settings"] == catalog.method("uce")["settings"]


def test_a_name_that_several_packages_claim_is_refused(site: Path, guest: str) -> None:
    install(site, "second", {"methods": {"nullspace": "guest_package.nullspace", "uce": "guest_package.x"}})
    with pytest.raises(UsageError, match="'nullspace' is a name for methods of several packages: .*second"):
        family.load("methods", "nullspace")
    with pytest.raises(UsageError, match="conceptzap, second"):
        family.load("methods", "uce")  # ours never changes silently for a stranger's
    assert family.load("methods", "esd").__name__ == "conceptzap.methods.esd"


@pytest.mark.parametrize(
    "source, said",
    [
        (None, "the method 'broken' of stranger (is no module|cannot be found)"),
        ("import nothing_of_this_name", "the method 'broken' of stranger cannot be imported: No module named"),
        ("1 / 0", "the method 'broken' of stranger cannot be imported: division by zero"),
    ],
)
def test_a_broken_package_is_named(site: Path, source: str | None, said: str) -> None:
    if source:
        (site / "stranger_method.py").write_text(source)
    install(site, "stranger", {"methods": {"broken": "stranger_method"}})
    with pytest.raises(ResourceError, match=said) as caught:
        family.load("methods", "broken")
    assert "stranger" in caught.value.hint
    assert family.load("methods", "uce")
