"""What to cite for a file: the papers of the methods that made it, and conceptzap itself. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from conceptzap import format
from conceptzap.format import naming
from conceptzap.registry import family, papers
from conceptzap.report import Report

METHODS = "methods"
VERSION = re.compile(r"[0-9][0-9a-zA-Z.+]{0,40}")
SELF = """@software{{conceptzap,
  title = {{conceptzap: concepts erased from Stable Diffusion by one small file}},
  author = {{{{The conceptzap authors}}}}, version = {{{}}}
}}"""


def cite(paths: Sequence[Path | str], report: Report) -> dict[str, str]:
    """See `api.cite`."""
    made = [one for path in paths for one in format.read_header(naming.existing(path)).header.made]
    names = sorted({str(one["method"]) for one in made if one.get("method")})
    for name in (name for name in names if name not in family.members(METHODS)):
        report.warn(f"no method here is called {name!r}, so its paper is not known")
    known = (family.describe(METHODS, name)["paper"] for name in names if name in family.members(METHODS))
    versions = sorted(filter(None, {_version(one.get("versions")) for one in made}))
    found = {paper: papers.entries()[paper] for paper in sorted(filter(None, set(known)))}
    return found | {"conceptzap": SELF.format(", ".join(versions) or "unknown")}


def _version(versions: object) -> str:
    """Ours among the versions in a file, which may hold anything; "" for what is none."""
    found = versions.get("conceptzap") if isinstance(versions, Mapping) else None
    return found if isinstance(found, str) and VERSION.fullmatch(found) else ""
