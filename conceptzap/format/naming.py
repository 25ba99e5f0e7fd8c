"""What files are called when nobody says: slugs, and the names that stand beside one another. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from conceptzap.errors import UsageError

SUFFIX = ".lprompt.safetensors"
KEY_SUFFIX = f".key{SUFFIX}"
LONGEST = 80


def slug(text: str) -> str:
    """`text` in a-z, 0-9 and hyphens (NFKD, accents dropped, at most 80); its UTF-8 hex if none is left.

    The empty text has the empty slug.
    """
    plain = "".join(
        character
        for character in unicodedata.normalize("NFKD", text).lower()
        if not unicodedata.category(character).startswith("M")
    )
    kept = "".join(c if c.isascii() and c.isalnum() else " " for c in plain).split()
    name = "-".join(kept) or text.encode("utf-8", "surrogatepass").hex()
    return name[:LONGEST].strip("-")


def erasure_path(concepts: Sequence[str], output: Path | str | None = None) -> Path:
    """Where an erasure goes: `output` with the suffix, or `<slug>.lprompt.safetensors` here.

    An `output` that is a folder, or ends in a slash, gets the default name inside. Raises
    `UsageError` for an empty name, and for a folder where no concept gives one.
    """
    name = "-".join(slug(concept) for concept in concepts)[:LONGEST].strip("-") + SUFFIX
    if output is None:
        return Path(name)
    path = Path(output)
    if path.is_dir() or str(output).endswith("/"):
        if not concepts:
            raise UsageError(f"--output {str(path)!r} is a folder", f"for example: -o both{SUFFIX}")
        return path / name
    return path.with_name(_stem(path) + SUFFIX)


def _stem(path: Path) -> str:
    stem = path.name
    for suffix in (SUFFIX, ".safetensors", ".lprompt"):
        if stem.endswith(suffix):
            stem = stem.removesuffix(suffix)
            break
    if not stem.strip():
        raise UsageError(f"--output {str(path)!r} has no name", f"for example: -o cat{SUFFIX}")
    return stem


def key_path(path: Path) -> Path:
    """The key beside an erasure: `a.lprompt.safetensors` -> `a.key.lprompt.safetensors`."""
    return path.with_name(_stem(path) + KEY_SUFFIX)


def preview_path(path: Path) -> Path:
    """The before/after picture beside an erasure: `a.lprompt.safetensors` -> `a.png`."""
    return path.with_name(_stem(path) + ".png")


def picture_path(folder: Path, prompt: str, seed: int, taken: set[Path], force: bool) -> Path:
    """`<slug>-<seed>.png` in `folder`; a counter where that name exists (`force`: was given out).

    `taken` holds the names this run has given out and gains the new one.
    """
    base = f"{slug(prompt) or 'empty'}-{seed}"
    path, count = folder / f"{base}.png", 1
    while path in taken or (not force and path.exists()):
        count += 1
        path = folder / f"{base}-{count}.png"
    taken.add(path)
    return path
