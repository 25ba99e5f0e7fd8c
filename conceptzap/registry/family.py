"""A family is a folder; a member is a file in it; the file name is the registry.

Listing reads docstrings and constants by `ast`, so no member (and no torch) is imported for it.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from conceptzap.errors import UsageError

ROOT = Path(__file__).parents[1]


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...' for a name that is not known, or the list when nothing is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(options)}"


def members(family: str) -> dict[str, Path]:
    """Member name -> source file, sorted."""
    files = sorted((ROOT / family).glob("*.py"))
    return {path.stem: path for path in files if not path.stem.startswith("_")}


def require(family: str, name: str) -> Path:
    known = members(family)
    if name not in known:
        raise UsageError(f"no {family.rstrip('s')} is called {name!r}", suggest(name, known))
    return known[name]


def describe(family: str, name: str) -> dict[str, str]:
    """`summary` (first docstring line), `paper`, `title` of a member, read without importing it."""
    tree = ast.parse(require(family, name).read_text(encoding="utf-8"))
    doc = (ast.get_docstring(tree) or "").splitlines()
    return {"summary": doc[0] if doc else "", "paper": constant(tree, "PAPER")}


def constant(tree: ast.Module, name: str) -> str:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                return str(node.value.value)
    return ""


def load(family: str, name: str) -> ModuleType:
    """Import one member; an unknown name is a `UsageError` with close matches."""
    require(family, name)
    return importlib.import_module(f"conceptzap.{family}.{name}")
