"""What files are called: as they are named by people, and when nobody says. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from conceptzap.errors import UsageError

SUFFIX = ".lprompt.safetensors"
KEY_SUFFIX = f".key{SUFFIX}"
# what may be left out of an erasure's name, as it is tried
ENDINGS = (".safetensors", SUFFIX)
LONGEST = 80
LONGEST_STACK = 100  # characters of the whole name of a stack that nobody named
MARK = 8  # hexadecimal digits that tell apart what was cut
MOMENT = "%Y%m%d-%H%M%S"
RUN = re.compile(r"\d{8}-\d{6}-.+")


def place(path: Path | str) -> Path:
    """A path as it is meant: `~` is the user's folder, in whatever part of a command it stands."""
    return Path(os.path.expanduser(path))


def existing(name: Path | str) -> Path:
    """The file that is called `name`: as written, else with `.safetensors` or `.lprompt.safetensors`.

    A folder of that name does not hide the file. Where there is none, the name as it was written.
    `hf://user/repo/file[@revision]` is fetched from the hub (`remote.fetch`: what it raises).
    """
    from conceptzap.format import remote

    if remote.is_name(name):
        return remote.fetch(name)
    path = place(name)
    written = os.fspath(path)
    found = (text for text in (written, *(written + end for end in ENDINGS)) if _is_file(text))
    return Path(next(found, written))


def _is_file(text: str) -> bool:
    return os.path.exists(text) and not os.path.isdir(text)


def bare(name: str) -> str:
    """A file's name without the endings that may be left out: `a.lprompt.safetensors` -> `a`."""
    return name.removesuffix(SUFFIX).removesuffix(".safetensors").removesuffix(".lprompt")


def is_erasure(text: str) -> bool:
    """Whether `text` can only be meant as an erasure: it ends like one, and there is such a file.

    A name on the hub is never a prompt, whatever is there.
    """
    from conceptzap.format import remote

    if remote.is_name(text):
        return True
    return bare(text) != text and _is_file(os.fspath(existing(text)))


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
    path = place(output)
    if path.is_dir() or str(output).endswith("/"):
        if not concepts:
            raise UsageError(f"--output {str(path)!r} is a folder", f"for example: -o both{SUFFIX}")
        return path / name
    return path.with_name(_stem(path) + SUFFIX)


def run_folder(place_: Path | str, concepts: Sequence[str], now: datetime | None = None) -> Path:
    """The folder of one run in `place_`: `20261126-081500-van-gogh`. A folder called so is that run's."""
    folder = place(place_)
    if RUN.fullmatch(folder.name):
        return folder
    return folder / f"{now or datetime.now():{MOMENT}}-{bare(erasure_path(concepts).name)}"


def stack_path(title: str) -> Path:
    """Where a stack goes that nobody named: its titles' slugs joined by +, at most 100 characters.

    A name that would be longer is cut, and ends in a mark of all that it would have said.
    """
    name = "+".join(slug(part) for part in title.split(" + "))
    room = LONGEST_STACK - len(SUFFIX)
    if len(name) > room:
        mark = hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest()[:MARK]
        name = f"{name[: room - MARK - 1].rstrip('+-')}-{mark}"
    return Path(name + SUFFIX)


def _stem(path: Path) -> str:
    stem = bare(path.name)
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
