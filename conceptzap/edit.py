"""The values: `Gate`, `Edit`, `Header`, `Erasure`. What a method yields, a file holds and a base is given.

No torch at import: `inspect` reads headers without it. A tensor here is a torch one (methods put
`nn.Parameter`s in, files give plain tensors back) or, where only bytes matter, a `Raw` one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from conceptzap.errors import MismatchError, UsageError

if TYPE_CHECKING:
    import torch

Json = Any
Tensors = Mapping[str, "torch.Tensor | Raw"]
ROLES = ("erase", "key", "attack")
MAX_ROWS = 1024  # learned tokens behind the text of one cross-attention that can be open at once
NAME_DIGITS = 12
FILE_DTYPES = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bool": "BOOL", "torch.uint8": "U8",
    "torch.int8": "I8",
}  # fmt: skip


def canonical_json(value: Json) -> str:
    """The one JSON text of a value: keys sorted, no spaces, non-ASCII escaped, NaN and Inf refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Raw(NamedTuple):
    """A tensor as a file holds it: safetensors dtype, shape, little-endian bytes in row order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Little-endian bytes of a tensor, as safetensors stores them."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def raw(tensor: torch.Tensor | Raw) -> Raw:
    """The bytes of a tensor with its safetensors dtype (torch's name for one no file may hold)."""
    if isinstance(tensor, Raw):
        return tensor
    dtype = FILE_DTYPES.get(str(tensor.dtype), str(tensor.dtype))
    return Raw(dtype, tuple(tensor.shape), tensor_bytes(tensor))


def content_name(record: Json, tensors: Tensors) -> str:
    """First 12 hex digits of the sha256 over a record and the tensors that belong to it.

    A tensor counts as what `raw` makes of it, so a file's bytes have the same name without torch.
    """
    digest = hashlib.sha256(canonical_json(record).encode())
    for slot in sorted(tensors):
        dtype, shape, data = raw(tensors[slot])
        digest.update(canonical_json([slot, dtype, list(shape)]).encode())
        digest.update(data)
    return digest.hexdigest()[:NAME_DIGITS]


class Named:
    """A value named by its content: equal where the names are, whatever holds the tensors.

    The name is hashed once and kept for as long as no tensor can have changed: one that is trained,
    or in inference mode, is hashed at every use.
    """

    tensors: Tensors

    def record(self) -> dict[str, Json]:
        raise NotImplementedError

    def _stamp(self) -> tuple[int, ...] | None:
        """The versions of the tensors; None where one can change without a new version."""
        held = [tensor for tensor in self.tensors.values() if not isinstance(tensor, Raw)]
        if any(tensor.requires_grad or tensor.is_inference() for tensor in held):
            return None
        return tuple(tensor._version for tensor in held)

    @property
    def name(self) -> str:
        stamp = self._stamp()
        stamped, name = self.__dict__.get("_name", (None, ""))
        if stamp is None or stamped != stamp:
            name = content_name(self.record(), self.tensors)
            self.__dict__["_name"] = (stamp, name)
        return name

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, eq=False, repr=False)
class Gate(Named):
    """A factor 0..1 on an edit, read from the text states or the timestep (`gates.py` has the kinds)."""

    kind: str
    params: Mapping[str, Json] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Gate({self.kind}, {self.name})"

    def record(self) -> dict[str, Json]:
        return {"kind": self.kind, "params": dict(self.params)}

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of what it looks at, read side by side in this order; none where it looks at no picture."""
        return (self.params["site"], *self.params.get("beside", ())) if "site" in self.params else ()


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Named):
    """At these named modules (`sites`), do this `op` with these `tensors`, under these `gates`.

    All sites share the tensors. The gates multiply; none means always. `scale` is the strength,
    0 for absent, 1 as made. `role` says whether the edit suppresses (`erase`), restores (`key`)
    or comes from an `attack`.
    """

    op: str
    sites: tuple[str, ...]
    tensors: Tensors
    params: Mapping[str, Json] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    scale: float = 1.0
    role: str = "erase"

    def __repr__(self) -> str:
        slots, gates = " ".join(sorted(self.tensors)), " ".join(gate.kind for gate in self.gates)
        sites = "1 site" if len(self.sites) == 1 else f"{len(self.sites)} sites"
        return f"Edit({self.op} {slots} at {sites}, {gates or 'no gate'}, {self.scale:g}, {self.name})"

    def _stamp(self) -> tuple[int, ...] | None:
        """That of the gates, too, for their names are part of the record."""
        stamps = [super()._stamp(), *(gate._stamp() for gate in self.gates)]
        return None if None in stamps else tuple(n for stamp in stamps for n in stamp)

    def record(self) -> dict[str, Json]:
        return {
            "op": self.op,
            "sites": sorted(self.sites),
            "params": dict(self.params),
            "gates": sorted(gate.name for gate in self.gates),
            "scale": float(self.scale),
            "role": self.role,
        }

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of all that it depends on: its sites, and what its gates look at."""
        return (*self.sites, *(path for gate in self.gates for path in gate.modules))

    def scaled(self, strength: float) -> Edit:
        return self if strength == 1 else replace(self, scale=self.scale * strength)


@dataclass(frozen=True)
class BaseRef:
    """Which checkpoint an erasure was made on.

    `signature`: sha256 over names and shapes of the UNet and the text encoders (the architecture).
    `fingerprint`: part -> sha256 over fp16-rounded values; the parts are `attn2` (cross-attention),
    `text` (text encoders) and, when an edit touches anything else of the UNet, `unet`.
    """

    family: str
    id: str
    revision: str
    signature: str
    fingerprint: Mapping[str, str]

    def record(self) -> dict[str, Json]:
        return {
            "family": self.family,
            "id": self.id,
            "revision": self.revision,
            "signature": self.signature,
            "fingerprint": dict(self.fingerprint),
        }


@dataclass(frozen=True)
class Header:
    """What a file says about itself; shown, and never acted on beyond `base` and `canary`.

    `made`: one record per erasure that went in (method, config, seed, versions); `scores`: name ->
    value, low, high, n, seeds; `parents`: digests a stack came from; `canary`: edit name -> the
    self-test (`canary.py`); `extra`: unknown header fields, kept and shown; `thumbnail`: a small
    picture as a data URI, "" for none.
    """

    title: str
    concepts: tuple[str, ...]
    anchors: tuple[str, ...]
    base: BaseRef
    made: tuple[Mapping[str, Json], ...] = ()
    scores: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    canary: Mapping[str, Json] = field(default_factory=dict)
    extra: Mapping[str, Json] = field(default_factory=dict)
    thumbnail: str = field(default="", repr=False)


@dataclass(frozen=True, eq=False, repr=False)
class Erasure:
    """A header and its edits, sorted by name so that one value has one form.

    `digest` is the identity: sha256 of the canonical file without itself, set by `format`. Two
    erasures are equal when headers and edits are, sealed or not.
    """

    header: Header
    edits: tuple[Edit, ...]
    digest: str = ""

    def __repr__(self) -> str:
        pairs = zip(self.header.concepts, self.header.anchors, strict=False)
        concepts = ", ".join(f"{concept} to {anchor}" if anchor else concept for concept, anchor in pairs)
        digest = f", {self.digest[:NAME_DIGITS]}" if self.digest else ""
        return f"Erasure({concepts}: {len(self.edits)} edits for {self.header.base.family}{digest})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Erasure):
            return NotImplemented
        return self._names() == other._names() and self.header == other.header

    def __hash__(self) -> int:
        return hash(self._names())

    def _names(self) -> frozenset[str]:
        return frozenset(edit.name for edit in self.edits)

    def scaled(self, strength: float) -> Erasure:
        """The same erasure, weaker or stronger (0 to 2; 0 is absent, 1 as made), as a new value.

        It loses its scores and its picture, of another strength. Its self-test is still that of the
        edits at strength 1, for what a gated one does at a half follows from nothing stored. One of
        strength 0 does nothing that could be tested, so no base admits its file.
        """
        if strength == 1:
            return self
        tests = self.header.canary if strength else {}
        header = replace(self.header, scores={}, canary=tests, thumbnail="")
        return Erasure(header, sort_edits(edit.scaled(strength) for edit in self.edits))

    def with_role(self, role: str) -> tuple[Edit, ...]:
        return tuple(edit for edit in self.edits if edit.role == role)


def token_count(edit: Edit) -> int:
    """How many rows each slot of a `tokens` edit has; 0 where a tensor has no dimensions."""
    return sum(next(iter(edit.tensors.values())).shape[:1])


def sort_edits(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Edits by name, equal ones once."""
    by_name = {edit.name: edit for edit in edits}
    return tuple(by_name[name] for name in sorted(by_name))


def _union(name: str, maps: Iterable[Mapping[str, Json]]) -> dict[str, Json]:
    merged: dict[str, Json] = {}
    for one in maps:
        for key, value in one.items():
            if merged.setdefault(key, value) != value:
                raise MismatchError(
                    f"cannot stack: the files disagree on {name} {key!r}",
                    "stack erasures that were made on the same checkpoint",
                )
    return merged


def _stack_base(headers: list[Header]) -> BaseRef:
    first = headers[0].base
    for header in headers[1:]:
        if header.base.signature != first.signature:
            raise MismatchError(
                f"cannot stack: {headers[0].title!r} was made for {first.family} ({first.id}),"
                f" {header.title!r} for {header.base.family} ({header.base.id})",
                "stack erasures of one architecture",
            )
    ref = min((header.base for header in headers), key=lambda base: canonical_json(base.record()))
    prints = _union("the fingerprint of", (header.base.fingerprint for header in headers))
    return replace(ref, fingerprint=prints)


def stack(erasures: Iterable[Erasure]) -> Erasure:
    """One erasure from several: the union of their edits, in an order that no argument order changes.

    The same erasure twice counts once. A stack of one is that one. Raises `UsageError` for none and
    `MismatchError` when the architectures differ or the fingerprints contradict each other.
    """
    unique = {one.digest or str(id(one)): one for one in erasures}
    parts = [unique[key] for key in sorted(unique)]
    if not parts:
        raise UsageError("nothing to stack", "name at least one .lprompt.safetensors file")
    if len(parts) == 1:
        return parts[0]
    headers = [part.header for part in parts]
    pairs = sorted({pair for h in headers for pair in zip(h.concepts, h.anchors, strict=True)})
    made = {canonical_json(record): record for header in headers for record in header.made}
    header = Header(
        title=" + ".join(sorted({title for h in headers for title in h.title.split(" + ")})),
        concepts=tuple(concept for concept, _ in pairs),
        anchors=tuple(anchor for _, anchor in pairs),
        base=_stack_base(headers),
        made=tuple(made[key] for key in sorted(made)),
        parents=tuple(sorted({d for p in parts for d in (p.header.parents or (p.digest,))})),
        canary=_union("the canary of", (header.canary for header in headers)),
    )
    return Erasure(header, sort_edits(edit for part in parts for edit in part.edits))
