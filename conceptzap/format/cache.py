"""The one folder for what can be made again: where it is, how big it is, and how to empty it. No torch."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# clearing touches these subfolders and nothing else, whatever CONCEPTZAP_CACHE points at
KINDS = ("pictures", "words", "attacks", "dictionaries", "costs")


def root() -> Path:
    """`CONCEPTZAP_CACHE`, else the platform's cache folder (XDG on Linux)."""
    if named := os.environ.get("CONCEPTZAP_CACHE"):
        return Path(named).absolute()
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home)) / "conceptzap" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "conceptzap"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "conceptzap"


def folder(kind: str) -> Path:
    """The subfolder for one of `KINDS`; not made by asking."""
    if kind not in KINDS:
        raise ValueError(f"{kind} is no kind of cache: {KINDS}")
    return root() / kind


def size(path: Path) -> int:
    """Bytes of all files under `path`, 0 where there is none; links are not followed."""
    files = path.rglob("*") if path.is_dir() else ()
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())


def sizes() -> dict[str, int]:
    """Kind -> bytes."""
    return {kind: size(folder(kind)) for kind in KINDS}


def clear() -> int:
    """Remove what the cache holds and return the bytes that were freed."""
    before = sum(sizes().values())
    for kind in KINDS:
        if folder(kind).is_dir():
            shutil.rmtree(folder(kind), ignore_errors=True)
    return before - sum(sizes().values())
