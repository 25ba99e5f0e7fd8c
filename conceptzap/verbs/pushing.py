"""From an erasure on this disk to one on the Hugging Face hub, with its model card, and read back."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap import format
from conceptzap.errors import FormatError, ResourceError, UsageError, escape
from conceptzap.format import atomic, naming, remote
from conceptzap.format.container import FILE_LIMIT
from conceptzap.registry import hub
from conceptzap.report import Report
from conceptzap.verbs import citing

if TYPE_CHECKING:
    from conceptzap.format.lprompt import Info

CARD = "README.md"
PLAIN = re.compile(r"[\w.+-]+", re.ASCII)  # names that a shell, a URL and Markdown leave alone
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
BRANCH = re.compile(hub.REVISION, re.ASCII)


@dataclass(frozen=True)
class Pushed:
    """What was shared: `name` is what everybody loads it by, at this very commit.

    Of a dry run there are the names of what would be shared, and the folder `card`; `commit` and `url`
    are empty.
    """

    repo: str
    name: str
    digest: str
    files: tuple[str, ...]
    commit: str = ""
    url: str = ""
    card: Path | None = None


def push(
    path: Path | str,
    repo: str,
    *,
    private: bool,
    revision: str | None,
    message: str | None,
    licence: str,
    dry_run: bool,
    output: Path | str | None,
    force: bool,
    report: Report,
) -> Pushed:
    """See `api.push`."""
    # 1. what can be known here
    _check(repo, revision, licence)
    path = naming.existing(path)
    info = format.read_header(path)
    place = remote.Place(repo, _stem(path) + naming.SUFFIX, revision)
    files = _files(path, info, place, licence, report)
    if all(edit["role"] == "key" for edit in info.edits):
        report.warn("this is a key: whoever has it restores what the erasure took out")
    pushed = Pushed(repo, str(place), info.digest, tuple(files))
    if dry_run:
        return _on_this_disk(pushed, files, output or f"{_stem(path)}-card", force)
    # 2. to the hub, and back again
    report.phase(f"pushing to {repo}")
    message = message or f"{info.header.title}, {info.digest[:12]}"
    commit, url = _commit(repo, files, message, private, revision, force)
    there = remote.Place(repo, place.file, commit)
    if format.read_header(str(there)).digest != info.digest:
        raise ResourceError(f"{there} is not what was pushed", "push it again")
    return Pushed(repo, str(there), info.digest, tuple(files), commit, url)


def _check(repo: str, revision: str | None, licence: str) -> None:
    if not hub.is_repo(repo):
        hint = "it is named user/repo, for example: conceptzap push van-gogh someone/erasures"
        raise UsageError(f"{escape(repo)!r} is no repository of the hub", hint)
    if revision is not None and not BRANCH.fullmatch(revision):
        raise UsageError(f"--revision {escape(revision)!r} is no branch", "for example: --revision v2")
    if licence and not LICENCE.fullmatch(licence):
        hint = "use one of the hub's identifiers, for example: --license openrail++"
        raise UsageError(f"--license {escape(licence)!r} is none", hint)


def _stem(path: Path) -> str:
    """What the file is called there; a name that others could hardly type is made plain."""
    stem = naming.bare(path.name)
    return stem if PLAIN.fullmatch(stem) else naming.slug(stem)


def _files(path: Path, info: Info, place: remote.Place, licence: str, report: Report) -> dict[str, bytes]:
    """Name in the repository -> bytes: the erasure, a picture if there is one, the card."""
    from conceptzap.page import card

    data = atomic.read_regular(path, FILE_LIMIT)
    name, picture = _picture(path, info)
    shown = {f"{naming.bare(place.file)}.{name}": picture} if picture else {}
    called = str(remote.Place(place.repo, naming.bare(place.file), place.revision))
    cited = citing.cite([path], report)
    text = card.markdown(info, called, next(iter(shown), ""), licence, cited, card.modelspec(data))
    return {place.file: data, **shown, CARD: text.encode()}


def _picture(path: Path, info: Info) -> tuple[str, bytes]:
    """The ending and the bytes of the picture beside the file, if it is of it, else of the one inside."""
    from conceptzap.format import pictures

    beside = naming.preview_path(path)
    with suppress(FormatError):
        if pictures.read_text(beside).get("digest") == info.digest:
            return "png", atomic.read_regular(beside, FILE_LIMIT)
    kind, _, coded = info.header.thumbnail.partition(";base64,")
    return kind.rpartition("/")[2], base64.b64decode(coded)


def _on_this_disk(pushed: Pushed, files: Mapping[str, bytes], output: Path | str, force: bool) -> Pushed:
    """The card and its picture in a folder, as the repository would show them."""
    folder = naming.place(output)
    with suppress(FileExistsError):
        folder.mkdir()
    shown = {name: data for name, data in files.items() if not name.endswith(naming.SUFFIX)}
    for name in shown:
        atomic.check_writable(folder / name, force)
    for name, data in shown.items():
        atomic.write_atomic(folder / name, data, force)
    return replace(pushed, card=folder)


def _commit(
    repo: str, files: Mapping[str, bytes], message: str, private: bool, revision: str | None, force: bool
) -> tuple[str, str]:
    """Commit and address, once all of it is there; nothing is committed where it is there already."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        hint = f"get one at hf.co/settings/tokens that may write, then {hub.LOGIN}, or set HF_TOKEN"
        raise ResourceError(f"{repo} could not be pushed to: no token for the hub is here", hint)
    with hub.answering(repo, deed="pushed to"):
        api = HfApi()
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = api.model_info(repo, revision=revision, files_metadata=True)
        if private and not there.private:
            hint = "make it private on the hub first, or name another"
            raise UsageError(f"{repo} is public, and --private was asked for", hint)
        found = {one.rfilename: one for one in there.siblings or ()}
        new = {name: data for name, data in files.items() if not _same(found.get(name), data)}
        if taken := sorted(name for name in new if name in found and not force):
            hint = "write over it with --force, or rename the file"
            raise UsageError(f"{repo} has another {taken[0]}", hint)
        if not new:
            return there.sha, str(url)
        added = [CommitOperationAdd(name, data) for name, data in new.items()]
        done = api.create_commit(
            repo, added, commit_message=message, revision=revision, parent_commit=there.sha
        )
    return done.oid, str(url)


def _same(there: Any, data: bytes) -> bool:
    """Whether a file of the hub's listing has these bytes, by git's hash, or the sha256 of a large one."""
    if there is None:
        return False
    if there.lfs:
        return there.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
