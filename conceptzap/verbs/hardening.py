"""From an erasure to one that was attacked: rows that lead away and gates that look join, in a new file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure, Header, Json, sort_edits
from conceptzap.errors import UsageError, escape
from conceptzap.format import atomic, naming
from conceptzap.redteam import hardening
from conceptzap.report import Report
from conceptzap.result import check_seed
from conceptzap.runtime.gates import SIGHT
from conceptzap.task import Task
from conceptzap.training import lessons, wordings
from conceptzap.trust import admission
from conceptzap.trust.admission import Source
from conceptzap.verbs import erasing
from conceptzap.verbs.generating import find_base
from conceptzap.verbs.planning import BUDGETS
from conceptzap.verbs.work import plain

if TYPE_CHECKING:
    from conceptzap.verbs.generating import AnyBase

ENDING = "-hardened"


@dataclass(frozen=True)
class HardenedFile:
    """What `harden` wrote. `rounds`: concept -> what the rounds of attacks came to, column -> one of each.

    `n` pictures of what was found, `drawn` of them the concept, `through` of those past the gate till then.
    """

    path: Path
    bytes: int
    digest: str
    erasure: Erasure
    rounds: Mapping[str, Json]


def harden(
    source: Source,
    budget: str,
    base: AnyBase,
    *,
    output: Path | str | None = None,
    force: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
    report: Report,
) -> HardenedFile:
    """See `api.harden`. Raises `UsageError` for a file that was hardened as much already, or holds keys."""
    # 1. what can be known before the base is loaded
    check_seed(seed)
    if budget not in BUDGETS:
        raise UsageError(f"--budget {escape(budget)} is unknown", f"use {' or '.join(BUDGETS)}")
    path = None if isinstance(source, Erasure) else naming.existing(source)
    given = admission.read(source if path is None else path)
    made = _before(given, budget)
    name = naming.bare(path.name) if path else made.header.title
    target = naming.erasure_path((), output or f"{name}{ENDING}")
    atomic.check_writable(target, force)
    # 2. the base, and what of the erasure it admits
    report.phase(f"loading {base if isinstance(base, (str, Path)) else 'the base'}")
    here = find_base(base, device, dtype, prediction)
    admission.admit(here, given, False, report)
    # 3. attacked, and written once it acts as the file will give it back
    task = task_of(here, made.header)
    report.seed = seed
    done = hardening.harden(here, task, made.with_role("erase"), budget, report)
    more = [plain(edit) for edit in done.edits if edit not in made.edits]
    whole = _joined(here, made, given.digest, more, task, done.record)
    admission.admit(here, whole, False, report)
    format.save(whole, target, force)
    return HardenedFile(target, target.stat().st_size, whole.digest, whole, done.record["rounds"])


def _before(given: Erasure, budget: str) -> Erasure:
    """What is to be hardened: of a file that was, all but what joined it, if it is to stand more now."""
    title = given.header.title
    if not given.with_role("erase"):
        raise UsageError(f"{title!r} erases nothing", "name the erasure, not its key")
    own = tuple(edit for edit in given.edits if not _joined_in(edit))
    records = [made["harden"] for made in given.header.made if "harden" in made]
    said = [one.get("budget") if isinstance(one, Mapping) else one for one in records]
    once = bool(said) and all(one == BUDGETS[0] for one in said)
    if len(own) < len(given.edits) and not (own and once and budget != BUDGETS[0]):
        more = f"for more use --budget {BUDGETS[1]}"
        hint = more if own and once else "harden the file that it was made of"
        raise UsageError(f"{title!r} was hardened already", hint)
    return replace(given, edits=own)


def _joined_in(edit: Edit) -> bool:
    """Whether it came of hardening: it looks at the picture, or has a say in unconditional rows."""
    return "without" in edit.tensors or any(gate.kind == SIGHT for gate in edit.gates)


def task_of(base: Base, header: Header) -> Task:
    """What an erasure was made to do, by its header; what the base does not know is not kept."""
    records = [made for made in header.made if made]
    told = [kind for made in records for kind in made.get("kinds", ())]
    pairs = list(zip(header.concepts, header.anchors, strict=True))
    kinds = tuple(told) if len(told) == len(pairs) else tuple(wordings.guess_kind(*pair) for pair in pairs)
    words = [word for made in records for word in made.get("keep", ())] or lessons.usual_keep(kinds)
    gone = {concept.lower() for concept in header.concepts}
    known = (word for word in dict.fromkeys(words) if not base.unknown_words(word))
    keep = tuple(word for word in known if word.lower() not in gone)
    return Task(header.concepts, header.anchors, keep, kinds)


def _joined(
    base: Base, made: Erasure, parent: str, more: list[Edit], task: Task, record: Mapping[str, Json]
) -> Erasure:
    """The erasure with more edits, its self-tests and theirs; the scores were earned without them.

    What was tested together with edits that are gone is tested anew.
    """
    edits = sort_edits((*made.edits, *more))
    own = {one.name for edit in made.edits for one in (edit, replace(edit, scale=1.0))}  # as they are tested
    tests = {name: test for name, test in made.header.canary.items() if own >= set(test.get("edits", ()))}
    tested = {name for test in tests.values() for name in test.get("edits", ())}
    left = [edit for edit in made.edits if not {edit.name, replace(edit, scale=1.0).name} & tested]
    bare = [edit for edit in left if edit.scale]
    header = replace(
        made.header,
        base=base.reference(site for edit in edits for site in edit.modules),
        made=tuple({**one, "harden": dict(record)} for one in made.header.made),
        canary={**tests, **erasing.canaries(base, [*bare, *more], task)},
        scores={},
        thumbnail="",
        parents=(*made.header.parents, parent),
    )
    return format.seal(Erasure(header, edits))
