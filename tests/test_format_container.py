"""The container of an erasure as others see it: labels, thumbnail, safetensors, the header alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import safetensors
import safetensors.torch
import torch
from test_format import python

from conceptzap import format
from conceptzap.edit import Edit, Erasure, stack
from conceptzap.errors import FormatError
from conceptzap.format import container
from conceptzap.format import tree as header_tree
from tests.samples import CROSS, base, header, rich, small, tensor

PICTURE = "data:image/webp;base64,UklGRg=="


def pictured(text: str) -> Erasure:
    return replace(small(), header=replace(small().header, thumbnail=text))


def test_a_thumbnail_is_a_label_that_the_digest_covers():
    data = format.dumps(pictured(PICTURE))
    found = format.parse(data)
    assert found.header.thumbnail == PICTURE and format.dumps(found) == data
    metadata, _, _ = container.split(data)
    assert metadata["modelspec.thumbnail"] == PICTURE and PICTURE not in metadata["lprompt"]
    assert found.digest != format.digest_of(small()) == format.digest_of(pictured(""))
    place = data.index(PICTURE.encode())
    for bit in range(8 * len(PICTURE)):
        flipped = bytearray(data)
        flipped[place + bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            format.parse(bytes(flipped))
    assert found.scaled(0.5).header.thumbnail == "" and stack([found, rich()]).header.thumbnail == ""


@pytest.mark.parametrize("text", ["http://x/a.png", "data:text/html;base64,AAAA", PICTURE + "A" * 2**16, "x"])
def test_a_thumbnail_is_a_small_picture_or_nothing(text: str):
    with pytest.raises(FormatError, match="no small picture"):
        format.dumps(pictured(text))


def test_safetensors_reads_our_bytes(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    format.save(rich(), path)
    mine = {}
    for edit in format.load(path).edits:
        mine |= {f"{edit.name}.{slot}": value for slot, value in edit.tensors.items()}
        mine |= {f"{g.name}.{slot}": t for g in edit.gates for slot, t in g.tensors.items()}
    theirs = safetensors.torch.load(path.read_bytes())
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(mine)
        assert file.metadata() == container.split(path.read_bytes())[0]
    rewritten = safetensors.torch.save(theirs)
    assert container.split(rewritten)[2] == container.split(path.read_bytes())[2]


@pytest.mark.parametrize(
    ("family", "architecture", "v2", "version"),
    [
        ("sd1", "stable-diffusion-v1/lprompt", "False", "sd_v1"),
        ("sd2", "stable-diffusion-v2-512/lprompt", "True", "sd_v2"),
        ("sdxl", "stable-diffusion-xl-v1-base/lprompt", "False", "sdxl_base_v1-0"),
    ],
)
def test_labels_for_other_programs(family, architecture, v2, version):
    erasure = replace(small(), header=header(base=base(family)))
    metadata, _, buffer = container.split(format.dumps(erasure))
    digest = metadata.pop("digest")
    assert digest == format.digest_of(erasure)
    assert json.loads(metadata.pop("lprompt"))["base"]["family"] == family
    assert metadata == {
        "format": "lprompt/1",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "conceptzap",
        "modelspec.title": "Van Gogh",
        "modelspec.description": "erases Van Gogh to painting",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(buffer).hexdigest(),
        "ss_output_name": "Van Gogh",
        "ss_v2": v2,
        "ss_base_model_version": version,
    }


def test_every_family_has_its_labels():
    assert set(format.ARCHITECTURES) == set(header_tree.FAMILIES)


# -- reading the header ----------------------------------------------------------------------------


def test_read_header_shows_everything_but_values(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    digest = format.save(rich(), path)
    info = format.read_header(path)
    assert (info.path, info.bytes, info.digest) == (path, path.stat().st_size, digest)
    assert info.header == rich().header
    edits = {edit.name: edit for edit in rich().edits}
    assert [edit["name"] for edit in info.edits] == sorted(edits)
    for shown in info.edits:
        mine = edits[shown["name"]]
        assert {key: shown[key] for key in mine.record()} == mine.record()
        assert shown["slots"] == {
            slot: {"shape": list(t.shape), "dtype": t.dtype} for slot, t in mine.tensors.items()
        }
        assert set(shown["gates"]) <= set(info.gates)
    assert {gate["kind"] for gate in info.gates.values()} == {"match", "window", "curve", "token"}
    assert json.loads(json.dumps(info.gates)) == info.gates


def test_read_header_is_fast_and_without_torch(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    values = {"delta": tensor("F32", 150, 500)}
    format.save(Erasure(header(), (Edit("weight", (f"{CROSS}.to_k",), values),)), path)
    assert path.stat().st_size > 300_000
    code = (
        "import sys, time; from conceptzap.format import read_header\n"
        f"start = time.process_time(); read_header({str(path)!r}); end = time.process_time()\n"
        "print(end - start, any(m in sys.modules for m in ('torch', 'numpy', 'safetensors')))"
    )
    runs = [python(code).split() for _ in range(3)]
    assert {imported for _, imported in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.1
