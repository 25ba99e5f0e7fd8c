"""What methods say of themselves holds, and what is to be cited for a file is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from command import conceptzap, refused
from samples import rich

import conceptzap as package
from conceptzap import format, methods
from conceptzap.registry import catalog, config, family, papers

METHODS = list(family.members("methods"))
SOURCE = (config.PRESETS / "papers.bib").read_text(encoding="utf-8")


def test_one_method_is_the_default() -> None:
    (default,) = [one["name"] for one in catalog.methods() if one["default"]]
    assert default == methods.DEFAULT
    assert re.search(rf"^ *{default} \* ", conceptzap("methods").out, re.MULTILINE)
    assert conceptzap("methods").out.count(" * ") == 1


@pytest.mark.parametrize("name", METHODS)
def test_every_paper_has_an_entry(name: str) -> None:
    paper = family.describe("methods", name)["paper"]
    if paper:
        entry = papers.entries()[paper]
        assert f"eprint = {{{paper}}}" in entry and re.search(r"year = \{20\d\d\}", entry)
        assert all(f"  {field} = {{" in entry for field in ("title", "author"))
        assert entry.count("{") == entry.count("}")


def test_the_entries_are_all_that_the_file_holds() -> None:
    assert "\n\n".join(papers.entries().values()) + "\n" == SOURCE
    used = {family.describe("methods", name)["paper"] for name in METHODS}
    assert set(papers.entries()) == used - {""}


def written(path: Path, *made: dict[str, object]) -> Path:
    erasure = rich()
    format.save(replace(erasure, header=replace(erasure.header, made=made)), path)
    return path


def test_a_file_is_cited_by_what_made_it(tmp_path: Path) -> None:
    """A stack by all its methods, each paper once; conceptzap by the version that made it."""
    first, second = METHODS[0], METHODS[-1]
    a = written(tmp_path / "a.lprompt.safetensors", {"method": first, "versions": {"conceptzap": "0.1.0"}})
    both = ({"method": first}, {"method": second, "versions": {"conceptzap": "0.2.0"}})
    b = written(tmp_path / "b.lprompt.safetensors", *both)
    papers_of = {family.describe("methods", name)["paper"] for name in (first, second)}
    assert list(package.cite([a, b])) == [*sorted(papers_of), "conceptzap"]
    assert "version = {0.1.0, 0.2.0}" in package.cite([a, b])["conceptzap"]
    answer = conceptzap("cite", tmp_path / "a", b)
    assert answer.code == 0 and answer.out.count("@") == len(papers_of) + 1 and answer.err == ""
    entries = conceptzap("cite", a, "--json").json["entries"]
    assert [entry["key"] for entry in entries] == [family.describe("methods", first)["paper"], "conceptzap"]
    assert conceptzap("cite", a, "-q").out.split() == [entry["key"] for entry in entries]


def test_what_is_unknown_is_said_and_what_is_forged_is_not_repeated(tmp_path: Path) -> None:
    forged = [{"method": "mine", "versions": "x"}, {"versions": {"conceptzap": "1}, evil = {"}}]
    file = written(tmp_path / "a.lprompt.safetensors", *forged)
    answer = conceptzap("cite", file)
    assert answer.code == 0 and "no method here is called 'mine'" in answer.err
    assert "version = {unknown}" in answer.out and "evil" not in answer.out


def test_what_is_no_erasure_is_not_cited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, 3, "no such file", "cite", "nothing")
