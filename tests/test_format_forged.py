"""Headers that say what they must not, with all else right; and header trees drawn at random."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptzap import format
from conceptzap.edit import Erasure, Gate, Raw, canonical_json, content_name
from conceptzap.errors import ConceptZapError, FormatError
from conceptzap.format import container
from conceptzap.format import tree as header_tree
from conceptzap.format.layout import unfold
from conceptzap.format.schema import GATES, OPS
from conceptzap.terminal import show
from tests.samples import (
    altered,
    header,
    refused,
    relabelled,
    rich,
    signed,
    small,
    whole,
)

Tree = dict[str, Any]


def tree(change: Callable[[Tree], Any], layout: int = 1) -> bytes:
    return altered(lambda tree, tensors: change(tree), layout)


def edit(of: str, layout: int = 1, /, **fields: Any) -> bytes:
    """The rich file with fields of one edit replaced; a field that is ... is taken away."""

    def change(tree: Tree) -> None:
        record = next(r for r in tree["edits"].values() if r["op"] == of)
        merged = {key: value for key, value in {**record, **fields}.items() if value is not ...}
        record.clear()
        record.update(merged)

    return tree(change, layout)


def gate(of: str, /, **fields: Any) -> bytes:
    return tree(lambda t: next(r for r in t["gates"].values() if r["kind"] == of).update(fields))


def score(**fields: Any) -> bytes:
    return tree(lambda t: t["scores"]["E"].update(fields))


def selftest(edits: int, layout: int = 1, /, **fields: Any) -> bytes:
    """The rich file with fields of its self-test of so many edits replaced."""

    def change(tree: Tree) -> None:
        next(test for test in tree["canary"].values() if len(test["edits"]) == edits).update(fields)

    return tree(change, layout)


def two(**fields: Any) -> bytes:
    return tree(lambda t: t.update(fields), 2)


def backwards(tree: Tree) -> None:
    record = next(r for r in tree["edits"].values() if len(r["sites"]) > 1)
    record["sites"].reverse()


def idle_gate(tree: Tree) -> None:
    idle = Gate("window", {"low": 1, "high": 2})
    tree["gates"][idle.name] = idle.record()


def spelt_out(tree: Tree) -> None:
    """A table that says the same in other words."""
    tree["sites"] = [list(unfold(patterns)) for patterns in tree["sites"]]


def other_values(tree: Tree, tensors: dict[str, Raw]) -> None:
    name = min(tensors)
    dtype, shape, data = tensors[name]
    tensors[name] = Raw(dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))


BOMB = "unet" + ".{a,b}" * 17
HEADER = {
    "newer version": (relabelled(format="lprompt/2"), "is lprompt/2, this .* reads lprompt/1"),
    "newer minor version": (relabelled(format="lprompt/1.1"), "lprompt/1.1"),
    "no format": (relabelled(format=None), "not an erasure"),
    "another format": (relabelled(format="lprompts"), "not an erasure"),
    "no header": (relabelled(lprompt=None), "JSON"),
    "a header that is a list": (relabelled(lprompt="[]"), "not of type dict"),
    "a header that is no JSON": (relabelled(lprompt="{"), "JSON"),
    "a header with a field twice": (relabelled(lprompt='{"title":"a","title":"b"}'), "twice"),
    "an unknown label": (relabelled(note="hidden"), "digest"),
    "a label that disagrees": (relabelled(ss_output_name="harmless"), "digest"),
    "a label missing": (relabelled(ss_v2=None), "digest"),
    "unknown op": (edit("adapter", op="exec"), "'exec' is unknown"),
    "op that is a list": (edit("adapter", op=[]), "not of type str"),
    "unknown role": (edit("adapter", role="boss"), "'boss' is unknown"),
    "unknown parameter": (edit("tokens", params={"phi": "none"}), "parameter 'phi' is unknown"),
    "parameter of another type": (edit("adapter", params={"k": 1.0}), "not of type int"),
    "boolean for a number": (edit("adapter", params={"k": True}), "not of type int"),
    "parameters that are a list": (edit("adapter", params=[]), "not of type dict"),
    "unknown field in an edit": (edit("adapter", when="always"), "unknown 'when'"),
    "edit without role": (edit("adapter", role=...), "lacks 'role'"),
    "scale of 3": (edit("adapter", scale=3.0), "no scale"),
    "negative scale": (edit("adapter", scale=-0.5), "no scale"),
    "scale that is an integer": (edit("adapter", scale=1), "no scale"),
    "no sites": (edit("adapter", sites=[]), "sites"),
    "site twice": (edit("adapter", sites=["unet.a", "unet.a"]), "each once"),
    "site that is a path": (edit("adapter", sites=["../unet"]), "no module path"),
    "site with a pattern": (edit("adapter", sites=["unet.*"]), "no module path"),
    "site with a line break": (edit("adapter", sites=["unet.a\n"]), "no module path"),
    "sites in another order": (tree(backwards), "digest"),
    "another site": (edit("adapter", sites=["unet.other"]), "digest"),
    "other values": (altered(other_values), "digest"),
    "unknown gate": (edit("adapter", gates=["0" * 12]), "is unknown"),
    "gates taken away": (edit("tokens", gates=[]), "digest"),
    "parts of text": (gate("match", params={"threshold": 1.0, "parts": ["a"]}), "parts.*not of type int"),
    "parts below zero": (gate("match", params={"threshold": 1.0, "parts": [-4, 8]}), "parts.* is no number"),
    "unknown gate kind": (gate("window", kind="eval"), "'eval' is unknown"),
    "unknown gate parameter": (gate("curve", params={"low": 1}), "'low' is unknown"),
    "another threshold": (gate("match", params={"threshold": 99.0}), "digest"),
    "gate of another kind": (gate("curve", kind="match"), "wrong slots: times, values"),
    "unused gate": (tree(idle_gate), "digest"),
    "edit without a name": (tree(lambda t: t["edits"].update(x={})), "edit x lacks"),
    "no title": (tree(lambda t: t.pop("title")), "no title"),
    "title that is a number": (tree(lambda t: t.update(title=3)), "not of type str"),
    "anchors missing": (tree(lambda t: t.update(anchors=[])), "same number"),
    "concept that is null": (tree(lambda t: t.update(concepts=[None, "a"])), "not of type str"),
    "parents that are names": (tree(lambda t: t.update(parents=["mum"])), "64 hexadecimal"),
    "scores that are numbers": (tree(lambda t: t.update(scores={"E": 1})), "not of type dict"),
    "unknown family": (tree(lambda t: t["base"].update(family="flux")), "'flux' is unknown"),
    "unknown field in base": (tree(lambda t: t["base"].update(url="x")), "unknown 'url'"),
    "base without id": (tree(lambda t: t["base"].pop("id")), "lacks 'id'"),
    "fingerprint of numbers": (tree(lambda t: t["base"].update(fingerprint={"a": 1})), "type str"),
    "no top component": (edit("adapter", params={"phi": "topk", "k": -1, "reads": "y"}), "no number from 1"),
    "score without n": (tree(lambda t: t["scores"]["E"].pop("n")), "lacks 'n'"),
    "score of text": (score(value="all"), "'E': value: all is no number"),
    "score of a list": (score(low=[1.0]), "'E': low"),
    "score of true": (score(high=True), "'E': high"),
    "score of an endless number": (score(value=10**400), "'E': value"),
    "score of half a picture": (score(n=0.5), "'E': n"),
    "score of fewer than none": (score(n=-1), "'E': n"),
    "score that is better sideways": (score(better="sideways"), "'sideways' is unknown"),
    "seed of text": (score(seeds=["one"]), "'E': seeds"),
    "seeds that are a number": (score(seeds=7), "'E': seeds"),
    "score with more": (score(note="<b>"), "unknown 'note'"),
    "made of text": (tree(lambda t: t.update(made=["x"])), "made: x is not of type dict"),
    "made by no method": (tree(lambda t: t["made"][0].update(method=1)), "method: 1 is not of type str"),
    "made keeping a number": (tree(lambda t: t["made"][0].update(keep=5)), "keep: 5 is not of type list"),
    "self-tests that are a list": (tree(lambda t: t.update(canary=[])), "canary"),
    "self-test of text": (tree(lambda t: t["canary"].update(a="x")), "canary 'a': x is not of type dict"),
    "self-test of no list": (selftest(2, edits={}), "edits: .* is not of type list"),
    "self-test of numbers": (selftest(2, edits=[1]), "edits: 1 is not of type str"),
    "self-test of no edits": (selftest(2, edits=[]), "tests no edit"),
    "self-test without a prompt": (selftest(2, prompt=None), "prompt: None"),
    "self-test with a seed of text": (selftest(2, seed="7"), "seed: 7 is not of type int"),
    "self-test with a seed too large": (selftest(2, seed=2**63), "seed"),
    "self-test with numbers alone": (selftest(2, change=[1.0]), "change: .* is not of type dict"),
    "self-test with text for a number": (selftest(2, change={"unet.a": "1"}), "change: 1 is no number"),
    "self-test below zero": (selftest(2, change={"unet.a": -1.0}), "change: -1.0 is no number"),
    "self-test at no module": (selftest(2, change={"../unet": 1.0}), "no module path"),
    "self-test with more": (selftest(2, run="rm"), "unknown 'run'"),
    "unknown layout": (two(layout=3), "layout 3 is unknown"),
    "layout that is true": (two(layout=True), "layout True is unknown"),
    "first layout, said": (two(layout=1), "lacks .params."),
    "second layout, not said": (tree(lambda t: t.pop("layout"), 2), "lacks|not of type"),
    "no table": (two(sites=None), "sites: None is not of type list"),
    "table of text": (two(sites=["unet.a"]), "sites: unet.a is not of type list"),
    "table of numbers": (two(sites=[[1]]), "sites: 1 is not of type str"),
    "table too short": (two(sites=[]), "sites: . is no number"),
    "table spelt out": (tree(spelt_out, 2), "digest"),
    "table with a list that nobody uses": (tree(lambda t: t["sites"].append(["unet.z"]), 2), "digest"),
    "table that explodes": (two(sites=[[BOMB]]), "too many module paths"),
    "table that explodes in its endings": (two(sites=[["unet.a", BOMB[4:]]]), "too many module paths"),
    "table of many large lists": (two(sites=[["unet.{%s}" % ",".join(map(str, range(40_000)))]] * 2), "too many"),
    "table of endless paths": (two(sites=[["unet." + "a" * 300]]), "too many module paths"),
    "sites that are a list": (edit("adapter", 2, sites=["unet.a"]), "not of type int"),
    "sites that are true": (edit("adapter", 2, sites=True), "not of type int"),
    "sites below the table": (edit("adapter", 2, sites=-1), "sites: -1 is no number"),
    "sites beyond the table": (edit("adapter", 2, sites=99), "sites: 99 is no number"),
    "edit without sites": (edit("adapter", 2, sites=...), "not of type int"),
    "a default that is said": (edit("adapter", 2, role="erase"), "digest"),
    "self-test with a number too few": (selftest(2, 2, change=[1.0]), "1 numbers for 3 sites"),
    "self-test with its sites said": (selftest(2, 2, sites=0), "numbers for|digest"),
    "self-test of nothing": (selftest(2, 2, edits=[]), "3 numbers for 0 sites"),
    "deep extra": (tree(lambda t: t.update(extra=[[[[[[[[]]]]]]]])), "nested"),
}


@pytest.mark.parametrize("case", HEADER)
def test_header(case, tmp_path):
    data, message = HEADER[case]
    error = refused(tmp_path / "a.lprompt.safetensors", data)
    assert re.search(message, str(error)), error


def test_the_forger_changes_nothing_by_himself():
    unchanged = altered(lambda tree, tensors: None)
    assert unchanged == format.dumps(rich()) and format.parse(unchanged)
    first = altered(lambda tree, tensors: None, 1)
    assert format.parse(first).header == rich().header and len(first) > len(unchanged)
    assert format.parse(relabelled()).digest == format.digest_of(small())


def test_the_digest_is_checked(tmp_path):
    metadata, entries, buffer = container.split(format.dumps(small()))
    for digest in ("", "0" * 64, metadata["digest"].upper()):
        data = container.pack({**metadata, "digest": digest}, entries, buffer)
        assert "digest" in str(refused(tmp_path / "a", data))
    del metadata["digest"]
    assert "digest" in str(refused(tmp_path / "a", container.pack(metadata, entries, buffer)))


def test_hint_for_a_newer_version_says_how_to_get_it(tmp_path):
    assert "pip install --upgrade" in refused(tmp_path / "a", relabelled(format="lprompt/2")).hint


@pytest.mark.parametrize("op", OPS)
def test_every_op_refuses_incomplete_slots(op):
    """Any one tensor taken from any edit: refused, unless it was optional."""
    for one in (edit for edit in rich().edits if edit.op == op):
        for slot in one.tensors:
            fewer = {key: value for key, value in one.tensors.items() if key != slot}
            erasure = Erasure(header(), (replace(one, tensors=fewer),))
            if slot in OPS[op].optional:
                format.dumps(erasure)
            else:
                with pytest.raises(FormatError, match="wrong slots|no tensors"):
                    format.dumps(erasure)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *(("F32", struct.pack("<f", number)) for number in (math.nan, math.inf, -math.inf)),
        *(("F32", struct.pack("<f", number)) for number in (65536.0, -65536.0, 3e38)),
        ("F32", b"\1\0\x80\x7f"),  # the smallest NaN
        *(("F16", struct.pack("<e", number)) for number in (math.nan, math.inf, -math.inf)),
        ("BOOL", b"\xff"),
        ("BOOL", b"\2"),
    ],
)
def test_values_that_are_no_numbers(dtype, value, tmp_path):
    slot = "keep" if dtype == "BOOL" else "delta"
    values = Raw(dtype, (3,), bytes(2 * len(value)) + value)

    def change(tree: Tree, tensors: dict[str, Raw]) -> None:
        record = {**next(r for r in tree["edits"].values() if r["op"] == "weight"), "gates": []}
        name = content_name(record, {slot: values})
        tree.update(edits={name: record}, gates={})
        tensors.clear()
        tensors[f"{name}.{slot}"] = values

    error = refused(tmp_path / "a.lprompt.safetensors", altered(change, 1))
    assert f".{slot} has 1 values" in str(error)


# -- at random -------------------------------------------------------------------------------------

TEXT = st.text(max_size=6) | st.sampled_from(["", "\ud800", "\x1b[2J", "\u202e", "a\0b", "\n"])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 4),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    st.sampled_from(["F32", "F16", "BOOL", "U8", "lprompt/1", "lprompt/2", "0" * 64, *OPS, *GATES]),
)
NAMES = ("0" * 12, "f" * 12, f"{'0' * 12}.up", f"{'0' * 12}.down", "threshold", "low", "phi")
CONTAINER = ("__metadata__", "format", "lprompt", "digest", "dtype", "shape", "data_offsets")
FIELDS = ("RESERVED", "BASE", "EDIT", "GATE", "TEST", "SCORE", "SCORE_MORE")
KNOWN = sorted({*NAMES, *CONTAINER, *(name for which in FIELDS for name in getattr(header_tree, which))})
KEYS = st.sampled_from(KNOWN) | TEXT
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


def attempt(data: bytes) -> None:
    """Read, and where that goes well, shown as `inspect` shows it."""
    with contextlib.suppress(ConceptZapError):
        format.parse(data)
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            record = show.info_record(format.read_header(file.name))
        canonical_json(record)
        show.info(record)


def as_text(tree: Any) -> str:
    return canonical_json(tree)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=5), st.binary(max_size=40))
def test_any_container_header(entries, buffer):
    header = as_text(entries).encode()
    attempt(len(header).to_bytes(8, "little") + header + buffer)
    metadata = {"format": "lprompt/1", "lprompt": as_text(entries)}
    entries.pop("__metadata__", None)
    attempt(container.pack(metadata, entries, buffer))


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_lprompt_header(tree):
    attempt(relabelled(lprompt=as_text(tree)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["canary", "scores", "made", "extra"]), st.dictionaries(KEYS, TREES, max_size=4))
def test_any_canary_score_and_provenance(field, value):
    """What is read and signed is shown without a crash."""
    erasure = Erasure(header(**{field: (value,) if field == "made" else value}), small().edits)
    with contextlib.suppress(FormatError):
        attempt(format.dumps(erasure))


@settings(max_examples=250, deadline=None)
@given(st.data(), st.sampled_from([1, 2]))
def test_any_replacement_within_a_sound_header(data, layout):
    """One node of the rich header, at any depth, becomes something else."""
    tree, tensors, metadata = whole(layout)
    tree = copy.deepcopy(tree)
    node: Any = tree
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(keys))
        deeper = isinstance(node[key], (dict, list)) and node[key]
        if not deeper or data.draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    node[key] = data.draw(TREES)
    attempt(signed({**metadata, "lprompt": as_text(tree)}, *container.lay_out(tensors)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | TEXT.map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes(data):
    attempt(data)
    attempt(len(data).to_bytes(8, "little") + data)
