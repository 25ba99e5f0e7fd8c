"""From somebody else's file to an erasure: read, fitted to the base, measured like any, written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap import format, imports
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure, Header, Json, sort_edits
from conceptzap.errors import UsageError, escape
from conceptzap.evaluation import verdict
from conceptzap.evaluation.closing import Closing, closing
from conceptzap.format import atomic, naming
from conceptzap.imports import Found
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import check_seed
from conceptzap.task import Task
from conceptzap.training import lessons
from conceptzap.trust import admission
from conceptzap.verbs import erasing
from conceptzap.verbs import preview as preview_
from conceptzap.verbs.erasing import ErasedFile
from conceptzap.verbs.generating import described, find_base, usual

if TYPE_CHECKING:
    from conceptzap.verbs.generating import AnyBase

FAMILY = "imports"
ELSEWHERE = "it may be of another concept or for another base; it does what it did where it came from"


def import_(
    file: Path | str,
    concepts: Sequence[str],
    *,
    anchors: Sequence[str],
    kind: Sequence[str],
    form: str | None,
    base: AnyBase,
    prediction: str | None,
    seed: int,
    device: str,
    dtype: str,
    output: Path | str | None,
    force: bool,
    preview: bool,
    report: Report,
) -> ErasedFile:
    """See `api.import_`. Nothing is written before all of it is made."""
    started = time.monotonic()
    check_seed(seed)
    # 1. the file: what it is, and what it says that it erases
    found, form = _source(file, form, report)
    member = family.load(FAMILY, form)
    task = Task(_names(found, concepts or member.concepts(found)), tuple(anchors), (), tuple(kind))
    target = naming.erasure_path(task.concepts, output)
    picture = naming.preview_path(target) if preview else None
    for path in filter(None, (target, picture)):
        atomic.check_writable(path, force)
    # 2. the base, and what the file does to it
    report.phase(f"loading {base if isinstance(base, (str, Path)) else 'the base'}")
    here = find_base(base, device, dtype, prediction)
    report.phase(described(here))
    report.seed = seed
    task = _fitting(here, task, report)
    edits = sort_edits(member.edits(found, here, task, report))
    # 3. is it gone, and what did that cost?
    report.phase("measuring what is erased and what is kept")
    settings = replace(usual(here), batch=erasing.CLOSING_BATCH)
    closed = closing(here, edits, task, settings, seed, report)
    shown = erasing.drawn(here, task, edits, closed, seed, report) if preview else None
    # 4. the files, once the value acts as they will give it back
    made = {"method": form, "config": {}, "kinds": list(task.kinds), "keep": list(task.keep), "seed": seed}
    made |= {"imported": {"sha256": _digest(found.path)}, "versions": erasing.versions()}
    thumbnail = preview_.thumbnail(shown[0]) if shown else ""
    erasure = _assembled(here, edits, task, made, closed, thumbnail)
    admission.admit(here, erasure, True, report)
    format.save(erasure, target, force)
    if shown and picture:
        atomic.write_atomic(picture, preview_.sheet(here, task, erasure, *shown), force)
    done = ErasedFile(
        path=target, bytes=target.stat().st_size, digest=erasure.digest, method=form,
        seconds=time.monotonic() - started, scores=closed.scores, preview=picture if shown else None,
        key=None, erasure=erasure, verdict=closed.verdict, prompt=preview_.telling_prompt(here, task),
    )  # fmt: skip
    verdict.check_gone(done, done.scores, f"still show it (kept: {escape(target)})", ELSEWHERE)
    return done


def _source(file: Path | str, form: str | None, report: Report) -> tuple[Found, str]:
    """The file, read, and its format, by its keys where nobody says."""
    if form is not None:
        family.require(FAMILY, form)
    source = naming.place(file)
    report.phase(f"reading {source.name}")
    found = imports.read(source)
    return found, form or imports.format_of(found)


def _assembled(
    base: Base, edits: Sequence[Edit], task: Task, made: dict[str, Json], closed: Closing, thumbnail: str
) -> Erasure:
    """The value, as its file gives it back."""
    header = Header(
        title=", ".join(task.concepts),
        concepts=task.concepts,
        anchors=tuple(anchor or "" for anchor in task.anchors),
        base=base.reference(site for edit in edits for site in edit.modules),
        made=(made,),
        scores=erasing.score_records(closed.scores, made["seed"]),
        canary=erasing.canaries(base, edits, task),
        thumbnail=thumbnail,
    )
    return format.seal(Erasure(header, tuple(edits)))


def _names(found: Found, concepts: Sequence[str]) -> tuple[str, ...]:
    if not concepts:
        raise UsageError(
            f"{escape(found.path.name)} does not say which concept it erases",
            'name it: --concept "Van Gogh"',
        )
    return tuple(concepts)


def _fitting(base: Base, task: Task, report: Report) -> Task:
    """The task with its kinds and the words to keep, of which the base knows all."""
    for word in (*task.concepts, *filter(None, task.anchors)):
        erasing.check_known(base, word)
    task = lessons.settled(base, task, report)
    return replace(task, keep=erasing.keepable(base, task.concepts, lessons.usual_keep(task.kinds)))


def _digest(path: Path) -> str:
    """sha256 of the file that was imported, so that it can be found again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
