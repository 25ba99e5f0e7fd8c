"""What there is to choose from: methods, attacks, their settings, presets. Read, never imported."""

from __future__ import annotations

import ast
import dataclasses
import io
import tokenize
from collections.abc import Set
from functools import cache
from typing import Any

from conceptzap.errors import UsageError
from conceptzap.registry import config, family

METHODS, ATTACKS = "methods", "attacks"
CONTRACT = family.ROOT / METHODS / "__init__.py"
PLAIN = "weight"  # what programs that know nothing of us can hold
CLOSED = "closed form"  # what neither trains nor samples
USUAL = {  # settings that mean the same in every method, where its own comment says nothing else
    "steps": "of training",
    "batch": "samples of a step",
    "lr": "learning rate",
    "rank": "of the change of a layer",
    "trajectories": "of partial sampling, cached: what training draws its samples from",
    "sites": "the layers that change: a pattern of module paths",
}
USUAL_OF_ATTACKS = {
    "tokens": "free tokens that are searched for",
    "rounds": "tries, one after each round",
    "tries": "pictures of each prompt",
    "steps": "of the search",
    "batch": "samples of a step",
    "lr": "learning rate",
    "decay": "weight decay",
    "evade": "weight of the gates' margins, in forms that evade them",
    "rank": "of the change of a layer",
    "sites": "the layers that change: a pattern of module paths",
}
COSTS = {"steps": "training", "trajectories": "sampling"}
KINDS = {kind.__name__: kind for kind in (bool, int, float, str)}


def methods() -> list[dict[str, Any]]:
    """Of every method: name, summary, paper, what it edits, its cost, whether that can be exported."""
    return [_head(name) for name in family.members(METHODS)]


def method(name: str) -> dict[str, Any]:
    """One method with its settings: name, type, default and the comment beside each.

    Raises `UsageError` with close matches for a name that is not known.
    """
    source = family.require(METHODS, name).read_text(encoding="utf-8")
    noted = [{**one, "note": one["note"] or USUAL.get(one["name"], "")} for one in _settings(source)]
    return {**_head(name), "settings": noted}


def settings(name: str) -> type:
    """The method's `Config`, frozen, made from its source: nothing of the method is imported."""
    source = family.require(METHODS, name).read_text(encoding="utf-8")
    fields = [
        (one["name"], KINDS[one["type"]], ast.literal_eval(one["default"])) for one in _settings(source)
    ]
    return dataclasses.make_dataclass("Config", fields, frozen=True)


def _head(name: str) -> dict[str, Any]:
    source = family.require(METHODS, name).read_text(encoding="utf-8")
    edits = family.constant(family.parsed(source), "EDITS")
    return {
        "name": name,
        **family.describe(METHODS, name),
        "edits": edits,
        "cost": _cost({one["name"] for one in _settings(source)}),
        "exports": edits.partition(";")[0] == PLAIN,
        "default": name == family.constant(family.parsed(CONTRACT.read_text(encoding="utf-8")), "DEFAULT"),
    }


def _cost(settings: Set[str]) -> str:
    """The dearest thing that a method with these settings does."""
    return next((cost for sign, cost in COSTS.items() if sign in settings), CLOSED)


def attacks() -> list[dict[str, Any]]:
    """Of every attack: name, summary, paper, whether it is a control."""
    return [_attack_head(name) for name in attack_names()]


def attack(name: str) -> dict[str, Any]:
    """One attack with its settings, as of a method; `UsageError` for a name that is not known."""
    known = attack_names()
    if name not in known:
        raise UsageError(f"no attack is called {name!r}", family.suggest(name, known))
    source = _source(name)
    paper = family.table(family.parsed(source), "PAPER_SETTINGS")
    settings = [{**one, "paper": paper.get(one["name"], "")} for one in _settings(source)]
    for one in settings:
        one["note"] = one["note"] or USUAL_OF_ATTACKS.get(one["name"], "")
    return {**_attack_head(name), "settings": settings}


def attack_names() -> dict[str, str]:
    """`ring-a-bell` -> `ring_a_bell`: what attacks are called, and their files."""
    return {stem.replace("_", "-"): stem for stem in family.members(ATTACKS)}


def _attack_head(name: str) -> dict[str, Any]:
    control = family.constant(family.parsed(_source(name)), "CONTROL") == "True"
    return {"name": name, **family.describe(ATTACKS, attack_names()[name]), "control": control}


def _source(name: str) -> str:
    return family.require(ATTACKS, attack_names()[name]).read_text(encoding="utf-8")


@cache
def _settings(source: str) -> tuple[dict[str, str], ...]:
    """What a source says of its settings; read once, for every run asks. Nobody may change it."""
    notes = _comments(source)
    return tuple(
        {
            "name": field.target.id,
            "type": ast.unparse(field.annotation),
            "default": _default(field.value),
            "note": notes.get(field.end_lineno or field.lineno, ""),
        }
        for node in family.parsed(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def _default(value: ast.expr | None) -> str:
    """What a setting is at first; of `share(0.25)`, which says how far it may go, the first word."""
    if isinstance(value, ast.Call):
        given = [one.value for one in value.keywords if one.arg == "default"]
        value = [*given, *value.args, value][0]
    return ast.unparse(value) if value else ""


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def presets() -> list[dict[str, Any]]:
    """Name, kind, summary, anchor and number of keep words of every preset."""
    return [_preset_head(name) for name in config.preset_names()]


def _preset_head(name: str) -> dict[str, Any]:
    table = config.preset(name)
    return {
        "name": name,
        "kind": table.get("kind", ""),
        "summary": table.get("summary", ""),
        "anchor": table.get("anchor", ""),
        "keep": len(config.kept_words(table)),
        "methods": sorted(table.get("methods", {})),
    }
