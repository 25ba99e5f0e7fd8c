"""The header's JSON tree <-> values, by a fixed schema: whatever is unknown is refused. No torch.

Only unknown fields at the top are kept (`Header.extra`). No field names a class, a path or a URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from conceptzap.edit import ROLES, BaseRef, Edit, Erasure, Gate, Header, Json, Raw
from conceptzap.errors import FormatError, escape
from conceptzap.format.container import GET_AGAIN
from conceptzap.format.schema import GATES, OPS, Kind

T = TypeVar("T")
NEWER = "if it is sound, it needs a newer conceptzap: pip install --upgrade conceptzap"
FAMILIES = ("sd1", "sd2", "sdxl")
SCALE_LIMIT = 2.0
DIGEST = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[0-9a-f]{12}")
SITE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
HEADER = frozenset("anchors base canary concepts edits gates made parents scores title".split())
BASE = frozenset("family fingerprint id revision signature".split())
EDIT = frozenset("gates op params role scale sites".split())
GATE = frozenset("kind params".split())


def write(header: Header, edits: Mapping[str, Edit], gates: Mapping[str, Gate]) -> dict[str, Json]:
    """The tree of a header whose edits and gates have these names."""
    clash = sorted(HEADER & set(header.extra))
    if clash:
        raise FormatError(f"the header has {clash[0]!r} as extra field", "give it another name")
    return {
        **header.extra,
        "anchors": list(header.anchors),
        "base": header.base.record(),
        "canary": dict(header.canary),
        "concepts": list(header.concepts),
        "edits": {name: edit.record() for name, edit in edits.items()},
        "gates": {name: gate.record() for name, gate in gates.items()},
        "made": [dict(record) for record in header.made],
        "parents": list(header.parents),
        "scores": {name: dict(score) for name, score in header.scores.items()},
        "title": header.title,
    }


def read(tree: Json, tensors: Mapping[str, Raw]) -> Erasure:
    """The erasure of a tree and the tensors that belong to it, all of it checked; no digest yet."""
    fields = _mapping(tree, "the header")
    missing = sorted(HEADER - set(fields))
    if missing:
        raise FormatError(f"the header has no {missing[0]}", GET_AGAIN)
    edits, gates = _mapping(fields["edits"], "edits"), _mapping(fields["gates"], "gates")
    slots = _by_owner(tensors, (*edits, *gates))
    made = {name: _gate(name, record, slots[name]) for name, record in gates.items()}
    read_edits = [_edit(name, edits[name], slots[name], made) for name in sorted(edits)]
    _check_used(made, read_edits)
    return Erasure(_header(fields), tuple(read_edits))


def _header(fields: Mapping[str, Json]) -> Header:
    header = Header(
        title=_text(fields["title"], "title"),
        concepts=_texts(fields["concepts"], "concepts"),
        anchors=_texts(fields["anchors"], "anchors"),
        base=_base(fields["base"]),
        made=tuple(_mapping(one, "made") for one in _sequence(fields["made"], "made")),
        scores=_mappings(fields["scores"], "scores"),
        parents=_texts(fields["parents"], "parents"),
        canary=_mapping(fields["canary"], "canary"),
        extra={key: value for key, value in fields.items() if key not in HEADER},
    )
    if len(header.anchors) != len(header.concepts):
        raise FormatError("concepts and anchors are not the same number", GET_AGAIN)
    if not all(DIGEST.fullmatch(parent) for parent in header.parents):
        raise FormatError("a parent is not 64 hexadecimal digits", "save what is stacked first")
    return header


def _base(value: Json) -> BaseRef:
    fields = _fields(value, "base", BASE)
    prints = _mapping(fields["fingerprint"], "base.fingerprint")
    return BaseRef(
        family=_one_of(fields["family"], "base.family", FAMILIES),
        id=_text(fields["id"], "base.id"),
        revision=_text(fields["revision"], "base.revision"),
        signature=_text(fields["signature"], "base.signature"),
        fingerprint={key: _text(text, "base.fingerprint") for key, text in prints.items()},
    )


def _by_owner(tensors: Mapping[str, Raw], owners: Iterable[str]) -> dict[str, dict[str, Raw]]:
    """Edit or gate -> slot -> tensor; every tensor must belong to one."""
    slots: dict[str, dict[str, Raw]] = {}
    for owner in owners:
        if owner in slots or not NAME.fullmatch(owner):
            raise FormatError(f"{escape(owner)!r} names no edit or gate", GET_AGAIN)
        slots[owner] = {}
    if not tensors:
        raise FormatError("it holds no tensors", GET_AGAIN)
    for name, tensor in tensors.items():
        owner, _, slot = name.partition(".")
        if owner not in slots:
            raise FormatError(f"tensor {escape(name)!r} belongs to no edit or gate", GET_AGAIN)
        slots[owner][slot] = tensor
    return slots


def _gate(name: str, value: Json, slots: Mapping[str, Raw]) -> Gate:
    where = f"gate {name}"
    fields = _fields(value, where, GATE)
    kind = _one_of(fields["kind"], f"{where}: kind", GATES)
    _check_slots(where, GATES[kind], slots)
    gate = Gate(kind, _params(fields["params"], where, GATES[kind]), slots)
    _check_name(where, gate.name, name)
    return gate


def _edit(name: str, value: Json, slots: Mapping[str, Raw], gates: Mapping[str, Gate]) -> Edit:
    where = f"edit {name}"
    fields = _fields(value, where, EDIT)
    op = _one_of(fields["op"], f"{where}: op", OPS)
    names = _texts(fields["gates"], f"{where}: gates")
    _check_slots(where, OPS[op], slots)
    edit = Edit(
        op=op,
        sites=_sites(fields["sites"], where),
        tensors=slots,
        params=_params(fields["params"], where, OPS[op]),
        gates=tuple(gates[_one_of(gate, f"{where}: gate", gates)] for gate in names),
        scale=_scale(fields["scale"], where),
        role=_one_of(fields["role"], f"{where}: role", ROLES),
    )
    _check_name(where, edit.name, name)
    return edit


def _sites(value: Json, where: str) -> tuple[str, ...]:
    sites = _texts(value, f"{where}: sites")
    odd = [site for site in sites if not SITE.fullmatch(site)]
    if odd:
        raise FormatError(f"{where}: {escape(odd[0])!r} is no module path", GET_AGAIN)
    if not sites or len(set(sites)) != len(sites):
        raise FormatError(f"{where} needs one or more sites, each once", GET_AGAIN)
    return sites


def _scale(value: Json, where: str) -> float:
    if type(value) is not float or not 0 <= value <= SCALE_LIMIT:
        hint = f"a strength is 0 to {SCALE_LIMIT:g}"
        raise FormatError(f"{where}: {escape(value)} is no scale", hint)
    return value


def _params(value: Json, where: str, kind: Kind) -> dict[str, Json]:
    params = _mapping(value, f"{where}: params")
    for key, one in params.items():
        name = f"{where}: parameter {escape(key)!r}"
        if key not in kind.params:
            raise FormatError(f"{name} is unknown", NEWER)
        if type(one) not in kind.params[key]:
            wanted = " or ".join(t.__name__ for t in kind.params[key])
            raise FormatError(f"{name} is not of type {wanted}", GET_AGAIN)
        if one not in kind.choices.get(key, (one,)):
            raise FormatError(f"{name} is {escape(one)!r}, which is unknown", NEWER)
    needed = kind.required | ({"k"} if params.get("phi") == "topk" else set())
    if missing := sorted(needed - set(params)):
        raise FormatError(f"{where}: parameter {missing[0]!r} is missing", GET_AGAIN)
    return params


def _check_slots(where: str, kind: Kind, slots: Mapping[str, Raw]) -> None:
    if not kind.accepts(frozenset(slots)):
        have = ", ".join(sorted(slots)) or "no tensors"
        raise FormatError(f"{where} has the wrong slots: {escape(have)}", NEWER)


def _check_name(where: str, name: str, expected: str) -> None:
    if name != expected:
        raise FormatError(f"{where} holds something else than its name says", GET_AGAIN)


def _check_used(gates: Mapping[str, Gate], edits: Iterable[Edit]) -> None:
    used = {id(gate) for edit in edits for gate in edit.gates}
    for name, gate in gates.items():
        if id(gate) not in used:
            raise FormatError(f"gate {name} is used by no edit", GET_AGAIN)


def _typed(value: Json, kind: type[T], where: str) -> T:
    if type(value) is not kind:
        raise FormatError(f"{where}: {escape(value)} is not of type {kind.__name__}", GET_AGAIN)
    return value


def _text(value: Json, where: str) -> str:
    return _typed(value, str, where)


def _sequence(value: Json, where: str) -> list[Json]:
    return _typed(value, list, where)


def _mapping(value: Json, where: str) -> dict[str, Json]:
    return _typed(value, dict, where)


def _mappings(value: Json, where: str) -> dict[str, dict[str, Json]]:
    return {key: _mapping(one, where) for key, one in _mapping(value, where).items()}


def _texts(value: Json, where: str) -> tuple[str, ...]:
    return tuple(_text(one, where) for one in _sequence(value, where))


def _fields(value: Json, where: str, names: frozenset[str]) -> dict[str, Json]:
    """A mapping with exactly these fields."""
    fields = _mapping(value, where)
    odd = sorted(names ^ set(fields))
    if odd:
        state = "lacks" if odd[0] in names else "has an unknown"
        raise FormatError(f"{where} {state} {escape(odd[0])!r}", NEWER)
    return fields


def _one_of(value: Json, where: str, known: Iterable[str]) -> str:
    name = _text(value, where)
    if name not in known:
        raise FormatError(f"{where} {escape(name)!r} is unknown", NEWER)
    return name
