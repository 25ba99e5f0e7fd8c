"""Files that are damaged, something else, or a container that is wrong: each refused in one line.

What can be is wrong in one way only, and signed with the digest that would be right for it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from conceptzap import format
from conceptzap.edit import canonical_json
from conceptzap.errors import FormatError
from conceptzap.format import container, lprompt
from tests.samples import refused, signed, small

SMALL = format.dumps(small())


# -- every bit, every length -----------------------------------------------------------------------

FLIPS = """
import sys
sys.modules["torch"] = None  # an import of torch would raise: what gets past the reading is no FormatError
from conceptzap.errors import FormatError
from conceptzap.format import load, read_header

path, accepted = sys.argv[1], []
original = open(path, "rb").read()
read_header(path)
with open(path, "r+b", buffering=0) as file:
    for bit in range(8 * len(original)):
        place, byte = bit // 8, original[bit // 8]
        file.seek(place), file.write(bytes([byte ^ 1 << bit % 8]))
        try:
            load(path)
            accepted.append(bit)
        except FormatError:
            pass
        except ImportError:
            accepted.append(bit)
        file.seek(place), file.write(bytes([byte]))
read_header(path)
print(len(original), accepted)
"""


def test_every_flipped_bit_is_refused_without_torch(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    path.write_bytes(SMALL)
    done = subprocess.run([sys.executable, "-c", FLIPS, str(path)], capture_output=True, text=True)
    assert done.stdout.split() == [str(len(SMALL)), "[]"], done.stderr
    assert format.load(path).digest == format.digest_of(small())


def test_whoever_reads_a_file_reads_it_the_same_way(tmp_path, monkeypatch):
    """What is refused when bits are flipped is refused by all: none has a reading of its own."""
    (tmp_path / "a.lprompt.safetensors").write_bytes(SMALL)
    refusal = FormatError("it is refused", "here")

    def refusing(path: object) -> None:
        raise refusal

    monkeypatch.setattr(lprompt, "_read", refusing)
    for reads in (format.load, format.read_header):
        with pytest.raises(FormatError) as caught:
            reads(tmp_path / "a.lprompt.safetensors")
        assert caught.value is refusal


def test_every_truncation_and_extension_is_refused(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    for length in range(len(SMALL)):
        refused(path, SMALL[:length])
    for tail in (b"\0", b" ", b"\n", SMALL):
        assert "too long" in str(refused(path, SMALL + tail))
    assert "cut off" in str(refused(path, SMALL[:-1]))
    assert "cut off within its header" in str(refused(path, SMALL[:100]))


# -- something else --------------------------------------------------------------------------------


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def torch_file(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, **options)
    return buffer.getvalue()


def foreign(metadata: dict[str, str] | None) -> bytes:
    return safetensors.torch.save({"lora_up.weight": torch.ones(2, 2)}, metadata)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SOMETHING_ELSE = {
    "empty": (b"", "empty", "again"),
    "7 bytes": (b"\1\0\0\0\0\0\0", "no safetensors", ""),
    "pickle": (pickle.dumps({"a": 1}), "a pickle", "never read"),
    "old torch": (torch_file(_use_new_zipfile_serialization=False), "a pickle", "never read"),
    "torch": (torch_file(), "torch checkpoint", "never read"),
    "zip": (zipped("a.txt"), "a zip archive", ""),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture", ""),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG picture", ""),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "a GGUF model", ""),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gzip", "unpack"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page", "raw file"),
    "LFS pointer": (LFS, "a git-LFS pointer", "git lfs pull"),
    "JSON": (b'{"a": 1}', "JSON text", ""),
    "JSON with a BOM": (b'\xef\xbb\xbf {"a": 1}', "JSON text", ""),
    "zeros": (bytes(4096), "no safetensors", ""),
    "a LoRA": (foreign({"format": "pt"}), "not an erasure", ".lprompt.safetensors"),
    "tensors without metadata": (foreign(None), "not an erasure", ".lprompt.safetensors"),
}


@pytest.mark.parametrize("case", SOMETHING_ELSE)
def test_what_it_really_is(case, tmp_path):
    data, what, hint = SOMETHING_ELSE[case]
    error = refused(tmp_path / "a.lprompt.safetensors", data)
    assert what in str(error) and hint in error.hint


def test_missing_folder_pipe_and_unreadable(tmp_path):
    path = tmp_path / "a.lprompt.safetensors"
    path.write_bytes(SMALL)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    cases = {
        tmp_path / "b.lprompt.safetensors": "no such file",
        tmp_path / "none" / "a": "no such file",
        tmp_path: "is a folder",
        tmp_path / "pipe": "not a regular file",
        tmp_path / "dangling": "no such file",
        tmp_path / "loop": "cannot read",
        path / "a": "cannot read",
        tmp_path / ("x" * 300): "cannot read",
        tmp_path / "a\0b": "cannot read",
        tmp_path / "a\ud800": "cannot read",
        Path("/dev/zero"): "not a regular file",
    }
    for bad, message in cases.items():
        for reader in (format.load, format.read_header):
            with pytest.raises(FormatError, match=message) as caught:
                reader(bad)
            assert caught.value.hint and str(caught.value).isprintable()
    path.rename(tmp_path / "van-gogh.lprompt.safetensors")
    with pytest.raises(FormatError) as caught:
        format.load(tmp_path / "van-goh.lprompt.safetensors")
    assert caught.value.hint == "did you mean van-gogh.lprompt.safetensors?"


def test_links_are_followed_for_reading(tmp_path):
    (tmp_path / "real").write_bytes(SMALL)
    os.symlink("real", tmp_path / "link.lprompt.safetensors")
    assert format.load(tmp_path / "link.lprompt.safetensors").digest == format.digest_of(small())


def test_a_file_is_opened_and_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.lprompt.safetensors"
    path.write_bytes(SMALL)
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    format.load(path)
    assert opened == [path]


def test_sizes_are_capped_before_parsing(tmp_path, monkeypatch):
    path = tmp_path / "a.lprompt.safetensors"
    with open(path, "wb") as file:
        file.truncate(container.FILE_LIMIT + 1)
    with pytest.raises(FormatError, match="too large"):
        format.load(path)
    monkeypatch.setattr(json, "loads", None)  # reaching it would be a TypeError
    with pytest.raises(FormatError, match="too large"):
        format.parse(header_bytes(b'{"a":"' + b"x" * container.HEADER_LIMIT + b'"}'))
    monkeypatch.setattr(container, "FILE_LIMIT", 2**20)
    with pytest.raises(FormatError, match="too large"):
        format.parse(SMALL + bytes(2**20))


# -- the container ---------------------------------------------------------------------------------


def header_bytes(header: bytes, buffer: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + buffer


def split_small() -> tuple[dict[str, str], dict[str, Any], bytes]:
    return container.split(SMALL)


def relaid(change: Callable[[dict[str, Any]], None], more: bytes = b"") -> bytes:
    """The small file with its tensor entries changed, signed anew."""
    metadata, entries, buffer = split_small()
    change(entries)
    return signed(metadata, entries, bytes(buffer) + more)


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(iter(entries.values()))


def set_first(**fields: Any) -> bytes:
    return relaid(lambda entries: first(entries).update(fields))


def moved(start: int, end: int, more: bytes = b"") -> bytes:
    """The tensor that lies second, moved."""

    def change(entries: dict[str, Any]) -> None:
        last = max(entries.values(), key=lambda entry: entry["data_offsets"])
        last["data_offsets"] = [start, end]

    return relaid(change, more)


def swapped() -> bytes:
    def change(entries: dict[str, Any]) -> None:
        one, other = entries.values()
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]

    return relaid(change)


def renamed(name: str) -> bytes:
    metadata, entries, buffer = split_small()
    tensors = container.cut(entries, buffer)
    tensors[name] = tensors.pop(min(tensors))
    return signed(metadata, *container.lay_out(tensors))


def text_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def retext(change: Callable[[bytes], bytes]) -> bytes:
    """The small file with another header text."""
    header = text_of(SMALL)
    changed = change(header)
    assert changed != header
    return header_bytes(changed, SMALL[8 + len(header) :])


def again(text: bytes, find: bytes, repeat: bytes) -> bytes:
    """The text with an object's opening brace followed by one more pair, as a duplicate."""
    place = text.index(find)
    return text[:place] + repeat + b"," + text[place:]


def twice(text: bytes) -> bytes:
    name = min(split_small()[1])
    entry = canonical_json(split_small()[1][name]).encode()
    return again(text, f'"{name}"'.encode(), f'"{name}":'.encode() + entry)


def twice_escaped(text: bytes) -> bytes:
    name = min(split_small()[1])
    entry = canonical_json(split_small()[1][name]).encode()
    escaped = f'"\\u{ord(name[0]):04x}{name[1:]}":'.encode()
    return again(text, f'"{name}"'.encode(), escaped + entry)


def backwards(text: bytes) -> bytes:
    pairs = reversed(json.loads(text).items())
    turned = json.dumps(dict(pairs), separators=(",", ":")).encode()
    return turned + b" " * (-len(turned) % 8)


CONTAINER = {
    "length 0": (bytes(8) + SMALL[8:], "no safetensors"),
    "length beyond the file": ((2**20).to_bytes(8, "little") + SMALL[8:], "cut off within"),
    "length over 10^8": ((10**8 + 1).to_bytes(8, "little") + SMALL[8:], "JSON|no safetensors"),
    "length 2^63": ((2**63).to_bytes(8, "little") + SMALL[8:], "no safetensors"),
    "not UTF-8": (retext(lambda t: t.replace(b"Van", b"V\xe9n")), "UTF-8"),
    "not JSON": (retext(lambda t: t.replace(b'"format"', b'"format')), "JSON"),
    "BOM": (retext(lambda t: b"\xef\xbb\xbf" + t), "no safetensors"),
    "NUL padding": (retext(lambda t: t.rstrip() + bytes(8)), "JSON"),
    "space before": (retext(lambda t: b" " + t), "no safetensors"),
    "space within": (retext(lambda t: t.replace(b":", b": ", 1)), "canonical"),
    "more padding": (retext(lambda t: t + b" " * 8), "canonical"),
    "tabs as padding": (retext(lambda t: t.rstrip() + b"\t" * 8), "canonical"),
    "keys in another order": (retext(backwards), "canonical"),
    "depth bomb": (header_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON"),
    "too deep": (header_bytes(b'{"a":' + b"[" * 8 + b"]" * 8 + b"}"), "nested"),
    "no object": (header_bytes(b'{"__metadata__":[]}'), "text to text"),
    "metadata with a number": (header_bytes(b'{"__metadata__":{"format":1}}'), "text to text"),
    "NaN literal": (header_bytes(b'{"a":NaN}'), "NaN"),
    "infinite literal": (header_bytes(b'{"a":-Infinity}'), "Infinity"),
    "infinite number": (header_bytes(b'{"a":1e999}'), "finite"),
    "endless integer": (header_bytes(b'{"a":' + b"9" * 5000 + b"}"), "JSON"),
    "tensor twice": (retext(twice), "twice"),
    "tensor twice, escaped": (retext(twice_escaped), "twice"),
    "metadata entry twice": (
        retext(lambda t: again(t, b'"format"', b'"format":"lprompt/1"')),
        "twice",
    ),
    "metadata twice": (
        retext(lambda t: again(t, b'"__metadata__"', b'"__metadata__":{}')),
        "twice",
    ),
    "field in an entry": (set_first(note="hidden"), "digest"),
    "entry without shape": (relaid(lambda e: first(e).pop("shape")), "shape None"),
    "entry that is a list": (relaid(lambda e: e.update({min(e): []})), "dtype None"),
    "overlap": (moved(0, 6), "digest"),
    "hole": (moved(8, 14, bytes(2)), "too long"),
    "trailing bytes": (relaid(lambda e: None, bytes(4)), "too long"),
    "offsets swapped": (swapped(), "digest"),
    "offsets backwards": (set_first(data_offsets=[6, 0]), "digest"),
    "offsets of floats": (set_first(data_offsets=[0.0, 6.0]), "digest"),
    "three offsets": (set_first(data_offsets=[0, 6, 6]), "digest"),
    "negative size": (set_first(shape=[-1, -3]), "shape"),
    "size of zero": (set_first(shape=[0, 2**62]), "shape"),
    "float size": (set_first(shape=[1.0, 3]), "shape"),
    "boolean size": (set_first(shape=[True, 3]), "shape"),
    "huge size": (set_first(shape=[10**4000, 10**4000]), "shape"),
    "huge product": (set_first(shape=[2**25] * 4), "cut off"),
    "100 dimensions": (set_first(shape=[1] * 100), "shape"),
    "wrong size": (set_first(shape=[1, 4]), "cut off"),
    "unknown dtype": (set_first(dtype="BF16"), "dtype BF16"),
    "dtype that is a number": (set_first(dtype=16), "dtype"),
    "path as name": (renamed("../../etc/passwd"), "wrong slots"),
    "NUL in a name": (renamed("a\0b"), "wrong slots"),
    "empty name": (renamed(""), "wrong slots"),
    "long name": (renamed("a" * 100_000), "wrong slots"),
    "control characters": (renamed("\x1b[2J\u202egnp.exe\n"), "wrong slots"),
    "name without slot": (renamed(small().edits[0].name), "wrong slots"),
    "unknown slot": (renamed(f"{small().edits[0].name}.extra"), "wrong slots: down, extra|into"),
    "no tensors": (signed(split_small()[0], {}, b""), "no tensors"),
}


@pytest.mark.parametrize("case", CONTAINER)
def test_container(case, tmp_path):
    data, message = CONTAINER[case]
    error = refused(tmp_path / "a.lprompt.safetensors", data)
    assert re.search(message, str(error)), error
