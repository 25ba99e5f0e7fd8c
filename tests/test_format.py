"""A value and its file: one sequence of bytes, the same value back, and safetensors reads it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptzap import format
from conceptzap.edit import Edit, Erasure, Gate, Raw, content_name, raw, stack
from conceptzap.errors import FormatError, UsageError
from conceptzap.format import container
from conceptzap.format import tree as header_tree
from tests.samples import CROSS, base, header, match, rich, small, tensor, torch_like

ROOT = Path(__file__).parent.parent
FIRST = Path(__file__).parent / "golden" / "every-kind.lprompt.safetensors"
FIRST_DIGEST = "a978cf8a1ca31b919443111bdd0e3d3cbad9205858fee5848015f2e8f08e4816"
FIRST_SHA256 = "bb7e5f59bf79f6efa4d198edb0be6be8382b08b974e8c519212b06738facd97b"
GOLDEN = Path(__file__).parent / "golden" / "every-kind-2.lprompt.safetensors"
GOLDEN_DIGEST = "055ac7a2dde7fe3fe828a6447e99f7fd6becedc8492ce2f8257bcb799f77340a"
GOLDEN_SHA256 = "db3c387566db30a1daab8fe26b799de4de8537f7b60c132819d3bb957837d769"


def equal(one: Erasure, other: Erasure) -> bool:
    """Same header, digest and edits; an edit's and a gate's name says all of its content."""
    names = [edit.name for edit in one.edits] == [edit.name for edit in other.edits]
    return names and (one.header, one.digest) == (other.header, other.digest)


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, cwd=ROOT
    )
    return done.stdout.strip()


# -- golden ----------------------------------------------------------------------------------------


def test_golden_file_reads_and_writes_for_ever():
    data = GOLDEN.read_bytes()
    read = format.load(GOLDEN)
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    assert read.digest == GOLDEN_DIGEST == format.read_header(GOLDEN).digest
    assert format.dumps(read) == data
    assert read.header.concepts == ("Van Gogh", "église 🏰")
    assert read.header.extra == {"note": {"kept": [None, True, 1, "x"]}}
    assert equal(read, replace(rich_sorted(), digest=GOLDEN_DIGEST))


def test_a_file_of_the_first_layout_reads_for_ever():
    """It keeps its digest, spells out what it always did, and is written anew in today's layout."""
    assert hashlib.sha256(FIRST.read_bytes()).hexdigest() == FIRST_SHA256
    read = format.load(FIRST)
    assert read.digest == FIRST_DIGEST == format.read_header(FIRST).digest
    test = {"0" * 12: {"seed": 7, "change": [0.25, -1e-9]}}  # older than self-tests as they are
    wanted = replace(rich_sorted().header, canary=test)
    assert equal(read, Erasure(wanted, rich_sorted().edits, FIRST_DIGEST))
    tested = replace(read, header=rich().header)
    assert format.dumps(tested) == GOLDEN.read_bytes()


def rich_sorted() -> Erasure:
    return replace(rich(), edits=tuple(sorted(rich().edits, key=lambda edit: edit.name)))


# -- round trip ------------------------------------------------------------------------------------


def test_torch_values_come_back_bit_for_bit(tmp_path):
    made = torch_like(rich())
    path = tmp_path / "a.lprompt.safetensors"
    digest = format.save(made, path)
    read = format.load(path)
    assert read.digest == digest == format.digest_of(made) == format.digest_of(read)
    assert read.header == made.header
    wanted = {edit.name: edit for edit in made.edits}
    assert [edit.name for edit in read.edits] == sorted(wanted)
    for edit in read.edits:
        mine = wanted[edit.name]
        pairs = [(edit.tensors, mine.tensors)]
        by_name = {gate.name: gate for gate in mine.gates}
        pairs += [(gate.tensors, by_name[gate.name].tensors) for gate in edit.gates]
        assert replace(edit, tensors={}, gates=()) == replace(
            mine, tensors={}, gates=(), sites=tuple(sorted(mine.sites))
        )
        for got, want in pairs:
            assert got.keys() == want.keys()
            for slot in got:
                assert got[slot].dtype == want[slot].dtype
                assert torch.equal(got[slot], want[slot])
                assert not got[slot].requires_grad


def test_raw_and_torch_have_one_name_and_one_file():
    for one, other in zip(rich().edits, torch_like(rich()).edits, strict=True):
        assert one.name == other.name
    assert format.dumps(rich()) == format.dumps(torch_like(rich()))


def test_content_name_tells_dtype_shape_slot_and_bytes_apart():
    same_bytes = [
        {"a": Raw("F32", (2,), bytes(8))},
        {"a": Raw("F16", (4,), bytes(8))},
        {"a": Raw("F16", (2, 2), bytes(8))},
        {"b": Raw("F16", (2, 2), bytes(8))},
        {"a": Raw("F16", (2, 2), bytes(7) + b"\1")},
    ]
    assert len({content_name({}, tensors) for tensors in same_bytes}) == len(same_bytes)
    assert raw(torch.zeros(2, 2, dtype=torch.float16)) == same_bytes[2]["a"]


def test_parameters_and_views_are_written_as_plain_tensors():
    plain = torch_like(small())
    down = plain.edits[0].tensors["down"]
    strided = torch.stack([down, -down], -1)[..., 0]
    assert not strided.is_contiguous()
    tensors = {"down": strided, "into": torch.nn.Parameter(plain.edits[0].tensors["into"])}
    edit = replace(plain.edits[0], tensors=tensors)
    assert format.dumps(Erasure(plain.header, (edit,))) == format.dumps(plain)


def test_order_of_edits_and_repeats_do_not_matter():
    erasure = rich()
    assert format.dumps(replace(erasure, edits=erasure.edits[::-1])) == format.dumps(erasure)
    assert format.dumps(replace(erasure, edits=erasure.edits * 2)) == format.dumps(erasure)


def test_seal_is_what_the_file_gives_back(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    format.save(rich(), path)
    assert equal(format.seal(rich()), format.load(path))
    assert isinstance(format.seal(rich()).edits[0].tensors.popitem()[1], torch.Tensor)


def test_shared_gate_is_stored_once_and_stays_shared():
    gate = match()
    prompt = {"prompt_k": tensor("F16", 1, 4), "prompt_v": tensor("F16", 1, 4)}
    edits = tuple(Edit("tokens", (site,), prompt, gates=(gate,)) for site in (CROSS, "unet.attn2"))
    sealed = format.seal(Erasure(header(), edits))
    assert sealed.edits[0].gates[0] is sealed.edits[1].gates[0]
    _, entries, _ = container.split(format.dumps(sealed))
    assert sum(name.startswith(gate.name) for name in entries) == 2


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MAP = st.dictionaries(TEXT, JSON, max_size=3)
NUMBER = st.floats(0, 1e6) | st.integers(0, 99)
SCORE = st.fixed_dictionaries(
    {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": st.integers(0, 2**40)},
    optional={"better": st.sampled_from(["lower", "higher"]), "seeds": st.lists(st.integers(0, 9))},
)
SITES = st.sampled_from([f"unet.{a}.{b}" for a in "abc" for b in "01"] + ["unet.a", f"{CROSS}.to_k"])
TEST = st.fixed_dictionaries(
    {
        "edits": st.lists(TEXT | st.just(small().edits[0].name), min_size=1, max_size=2),
        "prompt": TEXT,
        "seed": st.integers(0, 2**63 - 1),
        "change": st.dictionaries(SITES, NUMBER, max_size=5),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.tuples(TEXT, TEXT), max_size=3),
    title=TEXT,
    made=st.lists(MAP, max_size=2),
    scores=st.dictionaries(TEXT, SCORE, max_size=2),
    canary=st.dictionaries(TEXT, TEST, max_size=2),
    extra=MAP.map(lambda m: {k: v for k, v in m.items() if k not in header_tree.RESERVED}),
)
def test_any_header_comes_back_equal(names, title, made, scores, canary, extra):
    mine = header(
        title=title,
        concepts=tuple(concept for concept, _ in names),
        anchors=tuple(anchor for _, anchor in names),
        made=tuple(made),
        scores=scores,
        canary=canary,
        extra=extra,
    )
    erasure = replace(small(), header=mine)
    try:
        data = format.dumps(erasure)
    except FormatError as error:
        assert "nested" in str(error)
        return
    assert format.parse(data).header == mine
    assert format.dumps(format.parse(data)) == data


# -- canonical -------------------------------------------------------------------------------------


def test_same_bytes_in_every_process():
    code = (
        "import hashlib; from tests.samples import rich; from conceptzap import format;"
        "print(hashlib.sha256(format.dumps(rich())).hexdigest())"
    )
    seen = {python(code, PYTHONHASHSEED=seed) for seed in ("0", "1", "2")}
    assert seen == {hashlib.sha256(format.dumps(rich())).hexdigest()}


def test_file_knows_no_place_and_no_time(tmp_path):
    first, second = tmp_path / "first.lprompt.safetensors", tmp_path / "b"
    format.save(rich(), first)
    time.sleep(1.1)
    second.mkdir()
    format.save(rich(), second / "other.lprompt.safetensors")
    data = first.read_bytes()
    assert data == (second / "other.lprompt.safetensors").read_bytes()
    assert os.uname().nodename.encode() not in data and str(tmp_path).encode() not in data


def stacked(path: Path, *erasures: Erasure) -> bytes:
    for number, erasure in enumerate(erasures):
        format.save(erasure, path / f"{number}.lprompt.safetensors", force=True)
    read = [format.load(path / f"{number}.lprompt.safetensors") for number in range(len(erasures))]
    return format.dumps(stack(read))


def test_stacks_have_one_form(tmp_path):
    a, b = rich(), small()
    b = replace(b, header=header(title="church", concepts=("church",), anchors=("house",)))
    c = replace(b, edits=(replace(b.edits[0], scale=0.5),))
    a = replace(a, header=replace(a.header, parents=()))
    both = stacked(tmp_path, a, b)
    assert both == stacked(tmp_path, b, a)
    assert stacked(tmp_path, a, b, c) == stacked(tmp_path, c, b, a) == stacked(tmp_path, b, c, a)
    assert stacked(tmp_path, b, b) == format.dumps(b)
    parents = format.parse(both).header.parents
    assert parents == tuple(sorted((format.digest_of(a), format.digest_of(b))))


def test_digest_is_the_hash_of_the_file_without_it():
    data = format.dumps(rich())
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    claimed = tree["__metadata__"].pop("digest")
    text = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unsigned = len(text).to_bytes(8, "little") + text + data[8 + length :]
    assert hashlib.sha256(unsigned).hexdigest() == claimed == format.parse(data).digest


# -- what is not written ---------------------------------------------------------------------------


def with_values(**slots: torch.Tensor) -> Erasure:
    return Erasure(header(), (Edit("weight", (f"{CROSS}.to_k",), slots),))


def with_header(**fields) -> Erasure:
    return replace(small(), header=header(**fields))


def with_gate(gate: Gate) -> Erasure:
    return replace(small(), edits=(replace(small().edits[0], gates=(gate,)),))


NOT_WRITTEN = {
    "NaN": (
        lambda: with_values(delta=torch.tensor([[1.0, float("nan")]])),
        "1 values that are NaN",
    ),
    "infinite half": (
        lambda: with_values(delta=torch.tensor([[70000.0, 1.0]]).half()),
        "1 values that are NaN",
    ),
    "too large for half": (lambda: with_values(delta=torch.full((2, 2), 65536.0)), "4 values"),
    "bfloat16": (lambda: with_values(delta=torch.ones(2, 2).bfloat16()), "torch.bfloat16"),
    "double": (lambda: with_values(delta=torch.ones(2, 2).double()), "torch.float64"),
    "no values": (lambda: with_values(delta=torch.ones(0, 2)), "shape"),
    "unknown slot": (lambda: with_values(deltas=torch.ones(2, 2)), "wrong slots: deltas"),
    "no edits": (lambda: replace(small(), edits=()), "no tensors"),
    "NaN in the header": (lambda: with_header(extra={"a": float("nan")}), "cannot be saved"),
    "no self-test": (lambda: with_header(canary={"a": {"seed": 1}}), "self-test 'a' does not hold"),
    "a score without n": (lambda: with_header(scores={"E": {"value": 1.0}}), "lacks 'high'"),
    "an object in the header": (lambda: with_header(made=({"a": object()},)), "cannot be saved"),
    "numbers as keys": (lambda: with_header(extra={"a": {2: 1, 10: 1}}), "its digest"),
    "lone surrogate": (lambda: with_header(title="\ud800"), "surrogates not allowed"),
    "unequal anchors": (lambda: with_header(anchors=()), "same number"),
    "parent without digest": (lambda: with_header(parents=("",)), "64 hexadecimal"),
    "unknown family": (lambda: with_header(base=base("flux")), "'flux' is unknown"),
    "extra field twice": (lambda: with_header(extra={"title": "x"}), "'title'"),
    "header too large": (lambda: with_header(title="x" * 2**23), "too large"),
    "nested too deeply": (lambda: with_header(extra={"a": [[[[[[[[1]]]]]]]]}), "nested"),
    "strength 3": (lambda: replace(small(), edits=(small().edits[0].scaled(3),)), "no scale"),
    "threshold that is a whole number": (
        lambda: with_gate(replace(match(), params={"threshold": 1})),
        "not of type float",
    ),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_could_not_be_read_back_is_not_written(case, tmp_path):
    make, message = NOT_WRITTEN[case]
    with pytest.raises(FormatError, match=message):
        format.save(make(), tmp_path / "a.lprompt.safetensors")
    assert not list(tmp_path.iterdir())


def test_largest_half_is_written():
    values = torch.tensor([[65504.0, -65504.0, 6e-8, -0.0]])
    for dtype in (torch.float16, torch.float32):
        sealed = format.seal(with_values(delta=values.to(dtype)))
        assert torch.equal(sealed.edits[0].tensors["delta"], values.to(dtype))


def test_save_overwrites_only_when_told(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    format.save(small(), path)
    with pytest.raises(UsageError, match="exists"):
        format.save(rich(), path)
    assert path.read_bytes() == format.dumps(small())
    assert format.save(rich(), path, force=True) == format.digest_of(rich())
    assert path.read_bytes() == format.dumps(rich())
