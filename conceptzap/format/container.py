"""The safetensors container, in one form only: bytes <-> metadata and tensors. No torch.

8 bytes of header length, the header as JSON padded with spaces to a multiple of 8, the tensors end
to end, wider dtypes first, then by name (the order in which safetensors itself writes them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from conceptzap.edit import Json, Raw, canonical_json
from conceptzap.errors import FormatError, escape
from conceptzap.format.schema import DTYPES
from conceptzap.format.typed import GET_AGAIN

# room for 1,000 erasures in one file: 45 to 240 MB, of which 2 to 5 MB are header; JSON made to be
# large takes some 20 times its bytes when it is parsed
FILE_LIMIT = 512 * 2**20
HEADER_LIMIT = 16 * 2**20
DEPTH_LIMIT = 8
DIMENSIONS_LIMIT = 4
# values from 2^16 on overflow once a model runs in half precision
LARGEST = "65536"
NOT_OURS = "conceptzap reads .lprompt.safetensors files"
LFS_POINTER = "a git-LFS pointer, not the file it stands for"
NO_PICKLE = "a pickle can run code and is never read: convert it to safetensors elsewhere"
MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", NOT_OURS),
    (b"\xff\xd8\xff", "a JPEG picture", NOT_OURS),
    (b"GGUF", "a GGUF model", NOT_OURS),
    (b"\x1f\x8b", "gzip data", "unpack it first"),
    (b"version https://git-lfs", LFS_POINTER, "run: git lfs pull"),
    *((bytes((0x80, protocol)), "a pickle", NO_PICKLE) for protocol in (2, 3, 4, 5)),
)


def what_is(data: bytes) -> tuple[str, str]:
    """What a file that is no safetensors file really is, and what to do about it."""
    if not data:
        return "empty", GET_AGAIN
    for magic, name, hint in MAGIC:
        if data.startswith(magic):
            return name, hint
    if data.startswith(b"PK"):
        if b"data.pkl" in data[:4096]:
            return "a torch checkpoint (a zip with a pickle in it)", NO_PICKLE
        return "a zip archive", NOT_OURS
    text = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page", "the download answered with a page: get the raw file"
    if text.startswith((b"{", b"[")):
        return "JSON text", NOT_OURS
    return "no safetensors file", NOT_OURS


def strict_json(text: str) -> Json:
    """JSON without duplicate keys, NaN, infinite numbers, lone surrogates or more than 8 levels."""
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_finite_number,
            parse_constant=_finite_number,
        )
        _check_tree(tree, DEPTH_LIMIT)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header is not sound JSON: {escape(error)}", GET_AGAIN) from error
    return tree


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    tree: dict[str, Json] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"the key {key!r} is there twice")
        tree[key] = value
    return tree


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_tree(tree: Json, levels: int) -> None:
    if isinstance(tree, str):
        tree.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    elif isinstance(tree, (dict, list)):
        if levels == 0:
            raise ValueError(f"it is nested more than {DEPTH_LIMIT} deep")
        for value in (*tree, *tree.values()) if isinstance(tree, dict) else tree:
            _check_tree(value, levels - 1)


def split(data: bytes) -> tuple[dict[str, str], dict[str, Json], memoryview]:
    """Metadata, tensor entries (unchecked) and a view of the tensors' bytes of a file.

    Raises a `FormatError` that says what it is instead when it is no safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or not 2 <= length <= len(data) - 8:
        raise _not_safetensors(data, length)
    if length > HEADER_LIMIT or len(data) > FILE_LIMIT:
        limits = f"at most {HEADER_LIMIT} bytes of header and {FILE_LIMIT} in all are read"
        raise FormatError(f"it is too large: {limits}", "is it the file you meant?")
    try:
        text = data[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("its header is not UTF-8", GET_AGAIN) from error
    entries = strict_json(text)
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise FormatError("its metadata is not text to text", GET_AGAIN)
    return metadata, entries, memoryview(data)[8 + length :]


def _not_safetensors(data: bytes, length: int) -> FormatError:
    # 0x7b is "{": a header begins, so this was a safetensors file before it was cut
    if data[8:9] == b"{" and len(data) - 8 < length <= HEADER_LIMIT:
        return FormatError(f"it is cut off within its header ({len(data)} bytes)", GET_AGAIN)
    what, hint = what_is(data)
    return FormatError(f"it is {what}", hint)


def cut(entries: Mapping[str, Json], buffer: memoryview) -> dict[str, Raw]:
    """The tensors of a buffer, which they must fill end to end in canonical order, all finite.

    Where an entry says that its tensor lies is not read: it can lie in one place only, and entries
    that say otherwise are not those of `entries_of`.
    """
    shapes = {name: _shape(name, value) for name, value in entries.items()}
    tensors, end = {}, 0
    for name in _in_order({name: dtype for name, (dtype, _) in shapes.items()}):
        dtype, shape = shapes[name]
        start, end = end, end + math.prod(shape) * DTYPES[dtype]
        tensors[name] = Raw(dtype, shape, bytes(buffer[start:end]))
    if len(buffer) != end:
        state = "cut off" if len(buffer) < end else "too long"
        raise FormatError(f"it is {state}: {len(buffer)} of {end} bytes of tensors", GET_AGAIN)
    for name, tensor in tensors.items():
        _check_values(name, tensor)
    return tensors


def _shape(name: str, entry: Any) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor's entry."""
    dtype, shape = (entry.get(key) if type(entry) is dict else None for key in ("dtype", "shape"))
    if type(dtype) is not str or dtype not in DTYPES:
        raise FormatError(f"tensor {escape(name)} has the dtype {escape(dtype)}", GET_AGAIN)
    sound = type(shape) is list and len(shape) <= DIMENSIONS_LIMIT
    if not sound or not all(type(size) is int and 0 < size < FILE_LIMIT for size in shape):
        raise FormatError(f"tensor {escape(name)} has the shape {escape(shape)}", GET_AGAIN)
    return dtype, tuple(shape)


def _in_order(dtypes: Mapping[str, str]) -> list[str]:
    """Names of tensors as they lie in a file: wider dtypes first."""
    return sorted(dtypes, key=lambda name: (-DTYPES[dtypes[name]], name))


def entries_of(tensors: Mapping[str, Raw]) -> dict[str, Json]:
    """Tensor entries in the order in which they lie; `FormatError` for a dtype not in `DTYPES`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            hint = f"convert it to one of {', '.join(DTYPES)}"
            raise FormatError(f"tensor {escape(name)} is {escape(tensor.dtype)}", hint)
    entries, end = {}, 0
    for name in _in_order({name: tensor.dtype for name, tensor in tensors.items()}):
        dtype, shape, _ = tensors[name]
        start, end = end, end + math.prod(shape) * DTYPES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return entries


def lay_out(tensors: Mapping[str, Raw]) -> tuple[dict[str, Json], bytes]:
    """Tensor entries and buffer in canonical order; raises like `entries_of`."""
    entries = entries_of(tensors)
    return entries, b"".join(tensors[name].data for name in entries)


def head(metadata: Mapping[str, str], entries: Mapping[str, Json]) -> bytes:
    """All of a file that stands before its tensors."""
    header = canonical_json({"__metadata__": dict(metadata), **entries}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def pack(metadata: Mapping[str, str], entries: Mapping[str, Json], buffer: bytes) -> bytes:
    """The one file of these parts."""
    return head(metadata, entries) + buffer


def _bytes_where(test: Callable[[int], bool]) -> bytes:
    return bytes(byte for byte in range(256) if test(byte))


# high bytes (sign and exponent) from which on a value may be, or is, 2^16 or more
HIGH_F32 = _bytes_where(lambda byte: byte & 0x7F >= 0x47)
HIGH_F16 = _bytes_where(lambda byte: byte & 0x7C == 0x7C)
NOT_BOOL = _bytes_where(lambda byte: byte > 1)


def _count(data: bytes, wanted: bytes) -> int:
    return len(data) - len(data.translate(None, wanted))


def _unsound_f32(data: bytes) -> int:
    """How many little-endian floats are NaN, infinite or 2^16 and more (exponent field >= 143)."""
    high = data[3::4]
    if not _count(high, HIGH_F32):
        return 0
    pairs = zip(high, data[2::4], strict=True)
    return sum((top & 0x7F) << 1 | low >> 7 >= 143 for top, low in pairs)


def _check_values(name: str, tensor: Raw) -> None:
    if tensor.dtype in ("U8", "I8"):
        return
    if tensor.dtype == "BOOL":
        unsound, what = _count(tensor.data, NOT_BOOL), "neither 0 nor 1"
    else:
        what = f"NaN, infinite or {LARGEST} and more"
        f32 = tensor.dtype == "F32"
        unsound = _unsound_f32(tensor.data) if f32 else _count(tensor.data[1::2], HIGH_F16)
    if unsound:
        raise FormatError(f"tensor {escape(name)} has {unsound} values that are {what}", GET_AGAIN)
