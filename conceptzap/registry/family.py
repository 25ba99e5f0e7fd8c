"""A family is a folder; a member is a file in it; the file name is the registry.

Other packages bring members by entry points of the group `conceptzap.FAMILY` (methods, attacks,
judges, metrics, exports, imports): the name is the member's, the value a module that keeps the
family's contract, as the folder's `__init__` has it.

Listing reads docstrings and constants by `ast`, so no member (and no torch) is imported for it.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from conceptzap.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from importlib import metadata

ROOT = Path(__file__).parents[1]


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...' for a name that is not known, or the list when nothing is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(options)}"


def files(family: str) -> dict[str, Path]:
    """The members that are conceptzap's own: name -> source file, sorted."""
    found = sorted((ROOT / family).glob("*.py"))
    return {path.stem: path for path in found if not path.stem.startswith("_")}


def members(family: str) -> list[str]:
    """The names of all members, sorted: conceptzap's own, and those that other packages bring."""
    return sorted({*files(family), *(entry.name for entry in _guests(family))})


def require(family: str, name: str) -> Path:
    """The source of a member.

    Raises `UsageError` for an unknown name, with close matches, and for one that several packages
    claim; `ResourceError` where the module that a package names is not there.
    """
    own, guests = files(family).get(name), [entry for entry in _guests(family) if entry.name == name]
    one = family.rstrip("s")
    if len(guests) + bool(own) > 1:
        claim = [*(["conceptzap"] if own else []), *map(_package, guests)]
        raise UsageError(
            f"{name!r} is a name for {family} of several packages: {', '.join(claim)}",
            "uninstall all of these but one",
        )
    if not own and not guests:
        raise UsageError(f"no {one} is called {name!r}", suggest(name, members(family)))
    return own or _source(one, guests[0])


def describe(family: str, name: str) -> dict[str, str]:
    """`summary` (first docstring line), `paper`, `title` of a member, read without importing it."""
    tree = parsed(require(family, name).read_text(encoding="utf-8"))
    doc = (ast.get_docstring(tree) or "").splitlines()
    return {"summary": doc[0] if doc else "", "paper": constant(tree, "PAPER")}


@cache
def parsed(source: str) -> ast.Module:
    """A source taken apart, once: a list asks for several things of each. Nobody may change it."""
    return ast.parse(source)


def constant(tree: ast.Module, name: str) -> str:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                return str(node.value.value)
    return ""


def table(tree: ast.Module, name: str) -> dict[str, str]:
    """A dict of constants by its name, the values as they are written; {} where there is none."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Dict):
            return {key.value: ast.unparse(value) for key, value in zip(node.value.keys, node.value.values)}
    return {}


def load(family: str, name: str) -> ModuleType:
    """Import one member, which is `require`d first."""
    require(family, name)
    if name in files(family):
        return importlib.import_module(f"conceptzap.{family}.{name}")
    (entry,) = (entry for entry in _guests(family) if entry.name == name)
    try:
        return importlib.import_module(entry.value)
    except Exception as error:  # whatever a stranger's code may raise
        raise _lost(family.rstrip("s"), entry, f"cannot be imported: {error}") from error


# of other packages


@cache
def _installed() -> metadata.EntryPoints:
    from importlib import metadata  # a fourth of a start, which few commands need

    return metadata.entry_points()


def _guests(family: str) -> metadata.EntryPoints:
    return _installed().select(group=f"conceptzap.{family}")


def _package(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _source(one: str, entry: metadata.EntryPoint) -> Path:
    """The file of a guest. What importing its package runs is run, the module itself is not."""
    try:
        spec = importlib.util.find_spec(entry.value)
    except Exception as error:  # whatever a stranger's code may raise
        raise _lost(one, entry, f"cannot be found: {error}") from error
    if spec is None or not spec.has_location or spec.origin is None:
        raise _lost(one, entry, f"is no module {entry.value}")
    return Path(spec.origin)


def _lost(one: str, entry: metadata.EntryPoint, why: str) -> ResourceError:
    package = _package(entry)
    return ResourceError(f"the {one} {entry.name!r} of {package} {why}", f"fix {package} or uninstall it")
