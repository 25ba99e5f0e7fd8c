"""Erasures on the Hugging Face hub: `hf://user/repo/file[@revision]` becomes a file of its cache. No torch.

Nothing but `.lprompt.safetensors` is asked for, and what came is checked whole, its digest too, before
anybody gets its path. The revision may also stand behind the repository, as the hub's client writes it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from conceptzap.errors import FormatError, UsageError, escape
from conceptzap.format.naming import SUFFIX, bare
from conceptzap.registry import hub

BEGINS = re.compile(r"hf:/{1,2}(?!/)")  # a `Path` keeps one slash of two
NAME = re.compile(
    rf"hf:/{{1,2}}(?P<repo>{hub.REPO})(@(?P<early>[\w.-]+))?"
    rf"/(?P<file>[^@:\\\s][^@:\\]*)(@(?P<late>{hub.REVISION}))?",
    re.ASCII,
)
COMMIT = re.compile(r"[0-9a-f]{40}")
CACHED = re.compile(r".*/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/(?P<file>.+)")
SHAPE = "it is named hf://user/repo/file or hf://user/repo/file@revision"
ONLY = f"only files that end in {SUFFIX} are fetched"


@dataclass(frozen=True)
class Place:
    """A file on the hub; `revision` is a branch, a tag or a commit, None for the main branch."""

    repo: str
    file: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")


def is_name(name: Path | str) -> bool:
    """Whether this means a file on the hub."""
    return bool(BEGINS.match(os.fspath(name)))


def parse(name: Path | str) -> Place:
    """The file that is meant, its ending completed; raises `UsageError` for what names none."""
    text = os.fspath(name)
    found = NAME.fullmatch(text)
    shown = escape(BEGINS.sub("hf://", text))
    repo, early, file, late = found.group("repo", "early", "file", "late") if found else [""] * 4
    if not hub.is_repo(repo) or not _leads_down(file) or early and late:
        raise UsageError(f"{shown!r} names no file on the hub", SHAPE)
    if file.endswith(".safetensors") and not file.endswith(SUFFIX):
        raise UsageError(f"{shown!r} is no erasure by its name", ONLY)
    return Place(repo, bare(file) + SUFFIX, early or late)


def _leads_down(file: str) -> bool:
    """Whether a path leads down and nowhere else."""
    return all(part.strip() and part not in (".", "..") for part in file.split("/"))


def fetch(name: Path | str) -> Path:
    """The file as it lies in the hub's cache, fetched where it is not there, or is no longer the newest.

    Raises `UsageError` for a name that means no file, `FormatError` where the hub has none, or one that
    is no sound erasure (it is not kept), `ResourceError` for what is closed or cannot be reached.
    """
    place = parse(name)
    path = _cached(place) if COMMIT.fullmatch(place.revision or "") else None
    if path is None:
        with hub.answering(str(place), FormatError):
            path = _download(place)
    _check(path, place)
    return path


def _download(place: Place) -> Path:
    """The newest file of this name, or the one that was fetched when the hub was last reached."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    from conceptzap.format.container import FILE_LIMIT

    url = hf_hub_url(place.repo, place.file, revision=place.revision)
    try:
        size = get_hf_file_metadata(url, timeout=hub.PATIENCE).size or 0
    except Exception as error:
        if hub.is_answer(error):
            raise
        if path := _cached(place):
            return path
        raise LocalEntryNotFoundError(str(error)) from error
    if size > FILE_LIMIT:
        raise FormatError(f"{place} is too large: {size} bytes", f"at most {FILE_LIMIT} are read")
    return Path(hf_hub_download(place.repo, place.file, revision=place.revision, etag_timeout=hub.PATIENCE))


def _cached(place: Place) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(place.repo, place.file, revision=place.revision)
    return Path(path) if isinstance(path, str) else None


def _check(path: Path, place: Place) -> None:
    from conceptzap.format import container, lprompt
    from conceptzap.format.atomic import read_regular

    try:
        lprompt.parse(read_regular(path, container.FILE_LIMIT))
    except FormatError as error:
        for one in (path.resolve(), path):  # the link in the cache leads to the bytes
            one.unlink(missing_ok=True)
        raise FormatError(f"{place}: {error}", error.hint) from error


def origin(path: Path | str) -> Place | None:
    """What a file of the hub's cache is called there, by its commit; None for any other file."""
    found = CACHED.fullmatch(os.path.abspath(path))
    if not found:
        return None
    return Place(found["repo"].replace("--", "/"), found["file"], found["commit"])
