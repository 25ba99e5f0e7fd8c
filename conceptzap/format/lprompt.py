"""The file `lprompt/1`: an erasure as canonical safetensors bytes, checked whole when read.

What the metadata says beyond `lprompt` is derived from it, so that one value has one file. These
derivations belong to lprompt/1: a change in any of them would make every file there is unreadable.
`digest` is the sha256 of the file as it would be without that entry. Torch: `load`, `seal` only.
Files of an older `layout` are read, and keep their digest; what is written is of the newest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap.edit import (
    Edit,
    Erasure,
    Gate,
    Header,
    Json,
    Raw,
    Tensors,
    canonical_json,
    raw,
)
from conceptzap.errors import FormatError, escape
from conceptzap.format import container, layout, naming, tree
from conceptzap.format.atomic import read_regular, write_atomic
from conceptzap.format.naming import SUFFIX as SUFFIX

if TYPE_CHECKING:
    import torch

FORMAT = "lprompt/1"
UPGRADE = "it needs a newer conceptzap: pip install --upgrade conceptzap"
# family -> ModelSpec architecture, then what older UIs read: ss_base_model_version and ss_v2
ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "sd_v1", "False"),
    "sd2": ("stable-diffusion-v2-512", "sd_v2", "True"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
}
THUMBNAIL = "modelspec.thumbnail"
PICTURE = re.compile(r"data:image/(webp|jpeg|png);base64,[A-Za-z0-9+/]+={0,2}")
LARGEST_PICTURE = 2**16  # characters
VERBS = {"erase": "erases", "key": "restores", "attack": "attacks"}


@dataclass(frozen=True)
class Info:
    """What `inspect` shows of a file: size in bytes, header, edits and gates without values.

    An edit or a gate is its record with `name` and `slots` (slot -> `shape`, `dtype`).
    """

    path: Path
    bytes: int
    digest: str
    header: Header
    edits: list[dict[str, Json]]
    gates: dict[str, dict[str, Json]]


def read_header(path: Path | str) -> Info:
    """Everything about a file but its values, which are checked as `load` does; without torch.

    Raises `FormatError` for whatever is not a sound, canonical `lprompt/1` file.
    """
    path = naming.existing(path)
    erasure, size = _read(path)
    gates = {gate.name: _shown(gate) for edit in erasure.edits for gate in edit.gates}
    edits = [_shown(edit) for edit in erasure.edits]
    return Info(path, size, erasure.digest, erasure.header, edits, gates)


def load(path: Path | str) -> Erasure:
    """The erasure in a file, its tensors on the CPU; raises `FormatError` like `read_header`.

    A name may leave out `.safetensors` or `.lprompt.safetensors` (`naming.existing`).
    """
    return _with_torch(_read(naming.existing(path))[0])


def save(erasure: Erasure, path: Path | str, force: bool = False) -> str:
    """Write an erasure atomically (`atomic.write_atomic`: how, and what it raises); its digest."""
    data, digest = _sound(erasure)
    write_atomic(path, data, force)
    return digest


def dumps(erasure: Erasure) -> bytes:
    """The one file of an erasure; raises `FormatError` for one that could not be read back."""
    return _sound(erasure)[0]


def digest_of(erasure: Erasure) -> str:
    """The identity of an erasure: 64 hexadecimal digits."""
    return _pack(erasure)[1]


def seal(erasure: Erasure) -> Erasure:
    """The erasure as its file would give it back: edits sorted, tensors plain, digest set."""
    return _with_torch(parse(dumps(erasure)))


def parse(data: bytes) -> Erasure:
    """The erasure in a file's bytes, with `Raw` tensors and its digest; raises `FormatError`.

    It is written again and compared: bytes that are not the one file of what they say are refused.
    """
    metadata, entries, buffer = container.split(data)
    _check_format(metadata)
    tensors = container.cut(entries, buffer)
    full, number = layout.expand(container.strict_json(metadata.get("lprompt", "")))
    erasure = _with_picture(tree.read(full, tensors), metadata.get(THUMBNAIL, ""))
    again, own = _tree(erasure)
    head, digest = _head(erasure, _text(again, number), container.entries_of(own), buffer)
    if head != data[: len(data) - len(buffer)]:
        raise _altered(metadata.get("digest", ""), digest)
    return replace(erasure, digest=digest)


def _read(path: Path | str) -> tuple[Erasure, int]:
    data = read_regular(path, container.FILE_LIMIT)
    try:
        return parse(data), len(data)
    except FormatError as error:
        raise FormatError(f"{escape(path)}: {error}", error.hint) from error


def _check_format(metadata: dict[str, str]) -> None:
    found = metadata.get("format", "")
    if found == FORMAT:
        return
    if found.startswith("lprompt/"):
        raise FormatError(f"it is {escape(found)}, this conceptzap reads {FORMAT}", UPGRADE)
    raise FormatError("it is a safetensors file, but not an erasure", container.NOT_OURS)


def _with_picture(erasure: Erasure, picture: str) -> Erasure:
    """The erasure with the thumbnail that its file has; raises `FormatError` for what is none."""
    if not picture:
        return erasure
    if len(picture) > LARGEST_PICTURE or not PICTURE.fullmatch(picture):
        raise FormatError("its thumbnail is no small picture", container.GET_AGAIN)
    return replace(erasure, header=replace(erasure.header, thumbnail=picture))


def _altered(claimed: str, digest: str) -> FormatError:
    if claimed != digest:
        message = f"its digest is {digest[:12]}, it says {escape(claimed)[:12]}"
        return FormatError(message, container.GET_AGAIN)
    return FormatError("it is not in canonical form", "write it again with a current conceptzap")


def _sound(erasure: Erasure) -> tuple[bytes, str]:
    """The file and its digest, once it is known that it can be read."""
    data, digest = _pack(erasure)
    try:
        parse(data)
    except FormatError as error:
        hint = "fix what it names; nothing was written"
        raise FormatError(f"the erasure cannot be saved: {error}", hint) from error
    return data, digest


def _pack(erasure: Erasure) -> tuple[bytes, str]:
    """The file and its digest, unchecked."""
    try:
        full, tensors = _tree(erasure)
        text = _text(full, layout.LAYOUT)
    except (TypeError, ValueError, RecursionError) as error:
        hint = "a header holds text, finite numbers, lists and maps only"
        raise FormatError(f"the erasure cannot be saved: {escape(error)}", hint) from error
    entries, buffer = container.lay_out(tensors)
    head, digest = _head(erasure, text, entries, buffer)
    return head + buffer, digest


def _tree(erasure: Erasure) -> tuple[dict[str, Json], dict[str, Raw]]:
    """The full tree of an erasure, and its tensors as a file calls them."""
    edits = {edit.name: edit for edit in erasure.edits}
    gates = {gate.name: gate for edit in edits.values() for gate in edit.gates}
    owners: list[tuple[str, Edit | Gate]] = [*edits.items(), *gates.items()]
    tensors = {f"{n}.{slot}": raw(t) for n, owner in owners for slot, t in owner.tensors.items()}
    return tree.write(erasure.header, edits, gates), tensors


def _text(full: dict[str, Json], number: int) -> str:
    """The header as a file of this layout stores it."""
    return canonical_json(full if number == 1 else layout.compact(full))


def _head(
    erasure: Erasure, text: str, entries: Mapping[str, Json], buffer: bytes | memoryview
) -> tuple[bytes, str]:
    """All of a file that stands before its tensors, and its digest."""
    metadata = {"format": FORMAT, "lprompt": text, **_labels(erasure, buffer)}
    digest = hashlib.sha256(container.head(metadata, entries))
    digest.update(buffer)
    signed = {**metadata, "digest": digest.hexdigest()}
    return container.head(signed, entries), digest.hexdigest()


def _labels(erasure: Erasure, buffer: bytes | memoryview) -> dict[str, str]:
    """The entries by which other programs label a file (ModelSpec 1.0.1 and kohya's `ss_`)."""
    header = erasure.header
    architecture, version, v2 = ARCHITECTURES.get(header.base.family, ("", "", ""))
    return {
        "modelspec.architecture": f"{architecture}/lprompt",
        "modelspec.description": _description(erasure),
        "modelspec.hash_sha256": f"0x{hashlib.sha256(buffer).hexdigest()}",
        "modelspec.implementation": "conceptzap",
        "modelspec.sai_model_spec": "1.0.1",
        **({THUMBNAIL: header.thumbnail} if header.thumbnail else {}),
        "modelspec.title": header.title,
        "ss_base_model_version": version,
        "ss_output_name": header.title,
        "ss_v2": v2,
    }


def _description(erasure: Erasure) -> str:
    """For example `erases Van Gogh to painting, nudity`."""
    header = erasure.header
    verbs = " and ".join(VERBS[role] for role in VERBS if erasure.with_role(role))
    pairs = zip(header.concepts, header.anchors, strict=False)
    return f"{verbs} " + ", ".join(f"{c} to {a}" if a else c for c, a in pairs)


def _shown(owner: Edit | Gate) -> dict[str, Json]:
    tensors = {slot: raw(tensor) for slot, tensor in owner.tensors.items()}
    slots = {slot: {"shape": list(t.shape), "dtype": t.dtype} for slot, t in tensors.items()}
    return {"name": owner.name, **owner.record(), "slots": slots}


def _with_torch(erasure: Erasure) -> Erasure:
    """The same erasure with torch tensors for `Raw` ones; a gate that edits share stays one."""
    shared = {gate.name: gate for edit in erasure.edits for gate in edit.gates}
    shared = {name: replace(gate, tensors=_tensors(gate.tensors)) for name, gate in shared.items()}
    edits = []
    for edit in erasure.edits:
        gates = tuple(shared[gate.name] for gate in edit.gates)
        edits.append(replace(edit, tensors=_tensors(edit.tensors), gates=gates))
    return replace(erasure, edits=tuple(edits))


def _tensors(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {slot: _tensor(raw(tensor)) for slot, tensor in tensors.items()}


def _tensor(value: Raw) -> torch.Tensor:
    import torch

    dtypes = {
        "F32": torch.float32, "F16": torch.float16, "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    }  # fmt: skip
    dtype = dtypes[value.dtype]
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)
