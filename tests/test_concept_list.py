"""The list that `erase --from` is given: what cannot be meant is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import refused

from conceptzap.errors import UsageError
from conceptzap.verbs import concept_list

WRONG = {
    "unknown key": ("a.toml", '[[concept]]\nname = "x"\n\n[[concept]]\nnme = "y"\n', "a.toml:5: unknown key 'nme'"),
    "nearest": ("a.toml", '[[concept]]\nnme = "y"\n', "did you mean name"),
    "unknown table": ("a.toml", "steps = 1\n", "a.toml:1: unknown key 'steps'"),
    "no table": ("a.toml", 'concept = "cat"\n', "a.toml:1: concept is no list"),
    "not TOML": ("a.toml", "[[concept\n", "is not TOML"),
    "a number": ("a.toml", "[[concept]]\nname = 1\n", "a.toml:2: name = 1 is not a text"),
    "keep": ("a.toml", '[[concept]]\nname = "x"\nkeep = [1]\n', "a.toml:3: keep = [1] is not a list of texts"),
    "no name": ("a.toml", '[[concept]]\nanchor = "x"\n', "a.toml:1: a concept without a name"),
    "blank name": ("a.toml", 'concepts = [" "]\n', "a.toml:1: name ' ' is empty"),
    "no rows": ("a.toml", "concepts = []\n", "a.toml names no concept"),
    "empty": ("a.csv", "", "a.csv names no concept"),
    "twice": ("a.csv", "name\ncat\nCat\n", "a.csv:3: 'Cat' stands at a.csv:2, too"),
    "one file": ("a.csv", "name\nthe cat\nthe-cat\n", "a.csv:3: 'the-cat' would be written to the file of 'the cat'"),
    "missing column": ("a.csv", "anchor\ncat\n", "a.csv:1: there is no column 'name'"),
    "unknown column": ("a.csv", "name,anchr\ncat,dog\n", "a.csv:1: unknown column 'anchr'"),
    "column twice": ("a.csv", "name,name\ncat,dog\n", "a.csv:1: two columns are called 'name'"),
    "a comma more": ("a.csv", "name,anchor\ncat,dog,x\n", "a.csv:2: 3 cells for 2 columns"),
    "quoting": ("a.csv", 'name,anchor\ncat,"a"b\n', "a.csv:2: ',' expected after"),
    "open quote": ("a.csv", 'name,anchor\ncat,dog\n"tree,x\n', "a.csv:3: unexpected end of data"),
    "not UTF-8": ("a.csv", "name\ncaf\udce9\n", "it is not UTF-8 text"),
    "no such file": ("", "", "cannot read a.csv"),
    "another file": ("a.txt", "cat\n", "neither TOML nor CSV"),
    "method": ("a.csv", "name,method\ncat,x\n", "a.csv:2: no method is called 'x'"),
    "kind": ("a.csv", "name,kind\ncat,thing\n", "a.csv:2: unknown kind 'thing'"),
    "anchor": ("a.csv", "name,anchor\ncat,Cat\n", "a.csv:2: concept and anchor are both 'cat'"),
    "a word of the demo's": ("a.csv", "name\ncat\nzebra\n", "a.csv:3: demo does not know 'zebra'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_list_that_cannot_be_meant_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, text, message = WRONG[name]
    if file:
        (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path, 2, message, "erase", "--from", file or "a.csv")


WORDS = {
    "concepts beside it": (("cat",), "--from brings the concepts"),
    "several anchors": (("--anchor", "dog", "--anchor", "house"), "2 of --anchor for a list"),
    "a saved configuration": (("--save-config", "x.toml"), "--save-config is of one concept"),
    "a run's folder": (("--run-dir", "runs"), "--run-dir is of one concept"),
    "a negative limit": (("--limit", "-1"), "--limit -1 is out of range"),
}


@pytest.mark.parametrize("name", WORDS)
def test_options_that_a_list_cannot_take(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("name\ncat\n")
    more, message = WORDS[name]
    refused(tmp_path, 2, message, "erase", "--from", "a.csv", *more)


def test_rows_from_python_are_told_apart_by_number() -> None:
    for rows, message in (([1], "row 1: 1 is no concept"), (["a", {"name": "b", "x": "y"}], "row 2: unknown key 'x'")):
        with pytest.raises(UsageError, match=message):
            concept_list.read(rows)
    assert [row.name for row in concept_list.read(["a", {"name": "b"}])] == ["a", "b"]
