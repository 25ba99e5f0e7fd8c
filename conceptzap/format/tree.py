"""The header's JSON tree <-> values, by a fixed schema: whatever is unknown is refused. No torch.

Only unknown fields at the top are kept (`Header.extra`). No field names a class, a path or a URL.
The tree is the full one; `layout` says how a file stores it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from conceptzap.edit import ROLES, BaseRef, Edit, Erasure, Gate, Header, Json, Raw
from conceptzap.errors import FormatError, escape
from conceptzap.format.schema import GATES, NAMES, OPS, PACKED, PATHS, PHI, PLAIN_PHI, SCALED, Kind
from conceptzap.format.typed import (
    GET_AGAIN,
    NEWER,
    fields,
    mapping,
    number,
    one_of,
    sequence,
    text,
    texts,
    whole,
)
from conceptzap.result import MAX_SEED

FAMILIES = ("sd1", "sd2", "sdxl")
SCALE_LIMIT = 2.0
LARGEST = 2.0**53
DIGEST = re.compile(r"[0-9a-f]{64}")
SITE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
HEADER = frozenset("anchors base canary concepts edits gates made parents scores title".split())
RESERVED = HEADER | {"layout", "sites"}
BASE = frozenset("family fingerprint id revision signature".split())
EDIT = frozenset("gates op params role scale sites".split())
GATE = frozenset("kind params".split())
TEST, TEST_MORE = frozenset("change edits prompt seed".split()), frozenset(["length", "runs"])
LONGEST_TEXT = 77  # positions of a text that a self-test reads, at most
RUNS = "text"  # what a self-test runs of the UNet, where it runs less than all: modules that read text
SCORE, SCORE_MORE = frozenset("high low n value".split()), frozenset("better seeds".split())


def write(header: Header, edits: Mapping[str, Edit], gates: Mapping[str, Gate]) -> dict[str, Json]:
    """The full tree of a header whose edits and gates have these names."""
    if clash := sorted(RESERVED & set(header.extra)):
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


def read(tree: Mapping[str, Json], tensors: Mapping[str, Raw]) -> Erasure:
    """The erasure of a full tree and the tensors that belong to it; no digest yet.

    It need not be the only form of what it says: a name that is not its content's, a tensor or a
    gate that nobody uses are found by whoever writes the erasure again and compares.
    """
    if missing := sorted(HEADER - set(tree)):
        raise FormatError(f"the header has no {missing[0]}", GET_AGAIN)
    if not tensors:
        raise FormatError("it holds no tensors", GET_AGAIN)
    slots: dict[str, dict[str, Raw]] = {}  # edit or gate -> slot -> tensor
    for name, tensor in tensors.items():
        owner, _, slot = name.partition(".")
        slots.setdefault(owner, {})[slot] = tensor
    edits, gates = mapping(tree["edits"], "edits"), mapping(tree["gates"], "gates")
    made = {name: _gate(name, record, slots.get(name, {})) for name, record in gates.items()}
    for name, gate in made.items():
        for other in gate.params.get("told", ()):
            one_of(other, f"gate {escape(name)}: told", made)
    read_edits = [_edit(name, edits[name], slots.get(name, {}), made) for name in sorted(edits)]
    return Erasure(_header(tree), tuple(read_edits))


def _header(tree: Mapping[str, Json]) -> Header:
    scores, tests = mapping(tree["scores"], "scores"), mapping(tree["canary"], "canary")
    header = Header(
        title=text(tree["title"], "title"),
        concepts=texts(tree["concepts"], "concepts"),
        anchors=texts(tree["anchors"], "anchors"),
        base=_base(tree["base"]),
        made=tuple(_made(one) for one in sequence(tree["made"], "made")),
        scores={name: _score(one, f"score {escape(name)!r}") for name, one in scores.items()},
        parents=texts(tree["parents"], "parents"),
        canary={name: _test(one, f"canary {escape(name)!r}") for name, one in tests.items()},
        extra={key: value for key, value in tree.items() if key not in HEADER},
    )
    if len(header.anchors) != len(header.concepts):
        raise FormatError("concepts and anchors are not the same number", GET_AGAIN)
    if not all(DIGEST.fullmatch(parent) for parent in header.parents):
        raise FormatError("a parent is not 64 hexadecimal digits", "save what is stacked first")
    return header


def _base(value: Json) -> BaseRef:
    stored = fields(value, "base", BASE)
    prints = mapping(stored["fingerprint"], "base.fingerprint")
    return BaseRef(
        family=one_of(stored["family"], "base.family", FAMILIES),
        id=text(stored["id"], "base.id"),
        revision=text(stored["revision"], "base.revision"),
        signature=text(stored["signature"], "base.signature"),
        fingerprint={part: text(mark, "base.fingerprint") for part, mark in prints.items()},
    )


def _made(value: Json) -> dict[str, Json]:
    """How an erasure was made: free, but for what is shown in a way of its own."""
    record = mapping(value, "made")
    text(record.get("method", ""), "made: method")
    sequence(record.get("keep", []), "made: keep")
    return record


def _score(value: Json, where: str) -> dict[str, Json]:
    score = fields(value, where, SCORE, SCORE_MORE)
    for name in ("value", "low", "high"):
        number(score[name], f"{where}: {name}", -LARGEST, LARGEST)
    whole(score["n"], f"{where}: n", 0, MAX_SEED)
    if "better" in score:
        one_of(score["better"], f"{where}: better", ("lower", "higher"))
    for seed in sequence(score.get("seeds", []), f"{where}: seeds"):
        whole(seed, f"{where}: seeds", 0, MAX_SEED)
    return score


def _test(value: Json, where: str) -> dict[str, Json]:
    """A self-test; what names no edits tests none, and may hold what it likes."""
    if "edits" not in mapping(value, where):
        return value
    test = fields(value, where, TEST, TEST_MORE)
    one_of(test.get("runs", RUNS), f"{where}: runs", (RUNS,))
    whole(test.get("length", 1), f"{where}: length", 1, LONGEST_TEXT)
    if not texts(test["edits"], f"{where}: edits"):
        raise FormatError(f"{where} tests no edit", GET_AGAIN)
    text(test["prompt"], f"{where}: prompt")
    whole(test["seed"], f"{where}: seed", 0, MAX_SEED)
    for site, change in mapping(test["change"], f"{where}: change").items():
        _check_site(site, where)
        number(change, f"{where}: change", 0, LARGEST)
    return test


def _gate(name: str, value: Json, slots: Mapping[str, Raw]) -> Gate:
    where = f"gate {escape(name)}"
    stored = fields(value, where, GATE)
    kind = one_of(stored["kind"], f"{where}: kind", GATES)
    _check_slots(where, GATES[kind], slots)
    params = _params(stored["params"], where, GATES[kind])
    if "site" in params:
        _check_site(params["site"], where)
    return Gate(kind, params, slots)


def _edit(name: str, value: Json, slots: Mapping[str, Raw], gates: Mapping[str, Gate]) -> Edit:
    where = f"edit {escape(name)}"
    stored = fields(value, where, EDIT)
    op = one_of(stored["op"], f"{where}: op", OPS)
    _check_slots(where, OPS[op], slots)
    params = _params(stored["params"], where, OPS[op])
    if op == "adapter":
        _check_phi(where, params, slots)
    return Edit(
        op=op,
        sites=_sites(stored["sites"], where),
        tensors=slots,
        params=params,
        gates=tuple(gates[one_of(gate, f"{where}: gate", gates)] for gate in texts(stored["gates"], where)),
        scale=_scale(stored["scale"], where),
        role=one_of(stored["role"], f"{where}: role", ROLES),
    )


def _sites(value: Json, where: str) -> tuple[str, ...]:
    sites = texts(value, f"{where}: sites")
    for site in sites:
        _check_site(site, where)
    if not sites or len(set(sites)) != len(sites):
        raise FormatError(f"{where} needs one or more sites, each once", GET_AGAIN)
    return sites


def _check_site(site: str, where: str) -> None:
    if not SITE.fullmatch(site):
        raise FormatError(f"{where}: {escape(site)!r} is no module path", GET_AGAIN)


def _scale(value: Json, where: str) -> float:
    if type(value) is not float or not 0 <= value <= SCALE_LIMIT:
        hint = f"a strength is 0 to {SCALE_LIMIT:g}"
        raise FormatError(f"{where}: {escape(value)} is no scale", hint)
    return value


def _params(value: Json, where: str, kind: Kind) -> dict[str, Json]:
    params = mapping(value, f"{where}: params")
    for key, one in params.items():
        name = f"{where}: parameter {escape(key)!r}"
        if key not in kind.params:
            raise FormatError(f"{name} is unknown", NEWER)
        if type(one) not in kind.params[key]:
            wanted = " or ".join(t.__name__ for t in kind.params[key])
            raise FormatError(f"{name} is not of type {wanted}", GET_AGAIN)
        if one not in kind.choices.get(key, (one,)):
            raise FormatError(f"{name} is {escape(one)!r}, which is unknown", NEWER)
        for item in one if type(one) is list else ():
            _check_item(item, key, name, where)
        if type(one) in (int, float):
            number(one, name, *kind.ranges.get(key, (-LARGEST, LARGEST)))
    asked = [more for (key, word), more in kind.needs.items() if params.get(key) == word]
    _check_there(where, kind.required.union(*asked), params)
    return params


def _check_item(item: Json, key: str, name: str, where: str) -> None:
    """One of a parameter that is a list: a path, a gate's name or a number from 1."""
    if key in PATHS:
        _check_site(text(item, name), where)
    elif key in NAMES:
        text(item, name)
    else:
        whole(item, name, 1, 2**20)


def _check_there(where: str, needed: frozenset[str], params: Mapping[str, Json]) -> None:
    if missing := sorted(needed - set(params)):
        raise FormatError(f"{where}: parameter {missing[0]!r} is missing", GET_AGAIN)


def _check_phi(where: str, params: Mapping[str, Json], slots: Mapping[str, Raw]) -> None:
    """An adapter's tensors and parameters are those of its phi."""
    wanted, needed = PHI.get(params.get("phi", ""), PLAIN_PHI)
    _check_there(where, needed, params)
    also = OPS["adapter"].optional if "up" in wanted else frozenset()
    if not wanted <= set(slots) <= wanted | also:
        raise FormatError(f"{where} has the wrong slots: {escape(', '.join(sorted(slots)))}", NEWER)


def _check_slots(where: str, kind: Kind, slots: Mapping[str, Raw]) -> None:
    if not kind.accepts(frozenset(slots)):
        have = ", ".join(sorted(slots)) or "no tensors"
        raise FormatError(f"{where} has the wrong slots: {escape(have)}", NEWER)
    for slot, tensor in slots.items():
        whole = SCALED.get(slot) in slots
        if (tensor.dtype == "U8") != (slot in PACKED) or (tensor.dtype == "I8") != whole:
            raise FormatError(f"{where}: {slot} is of {tensor.dtype}", GET_AGAIN)
