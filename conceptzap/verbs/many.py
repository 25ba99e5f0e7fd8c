"""Many concepts in one run: a file each and their stack, begun anew or gone on with, on one process or many.

The base, the text states of prompts, the vectors of words and the base's pictures are shared, closed forms
are solved `TOGETHER`; nothing of this changes a bit, so that every file is the one that `erase` with the
row's arguments, `harden` among them, writes. What would change one, self-tests and pictures of several
concepts in one UNet call, is made for each by itself. A file that is there and was made by the same plan is
kept: the same command goes on after a kill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure, Header, Json, canonical_json
from conceptzap.errors import (
    FormatError,
    MismatchError,
    ThresholdError,
    UsageError,
    escape,
)
from conceptzap.evaluation import verdict
from conceptzap.evaluation.closing import Closing, closing
from conceptzap.redteam import hardening
from conceptzap.report import Report
from conceptzap.result import Score
from conceptzap.task import Task
from conceptzap.training import lessons, solving, states
from conceptzap.training.session import locked
from conceptzap.trust import admission
from conceptzap.verbs import concept_list, erasing, failing, launched, stacking
from conceptzap.verbs.concept_list import Plans
from conceptzap.verbs.generating import described, find_base, usual
from conceptzap.verbs.launched import Team
from conceptzap.verbs.planning import ErasePlan
from conceptzap.verbs.stacking import Stacked

TOGETHER = 8  # concepts whose closed forms are solved at once; as many are lost by a kill
PICTURES = 24  # of all concepts together that the stack is judged by, at least one each
ALONE = "run it alone with the command that is named"


@dataclass(frozen=True)
class ErasedOne:
    """One concept of a run. `kept`: an earlier run made its file; `seconds` are of this one.

    `error` is what went wrong, {} where nothing did; then `command` repeats it alone. `left`: in how many
    of how many of its pictures the stack still shows it, where that was measured.
    """

    concept: str
    anchor: str
    kind: str
    method: str
    path: Path
    bytes: int = 0
    digest: str = ""
    seconds: float = 0.0
    kept: bool = False
    error: Mapping[str, Json] = field(default_factory=dict)
    command: str = ""
    left: tuple[int, int] | None = None


@dataclass(frozen=True)
class ErasedAll:
    """What `erase_all` made: `files`, one each, in the order of the list, and the `stack` of all.

    There is no stack where one of them `failed`. `scores` and `verdict` are of the stack, empty where nothing
    was measured. Of several processes the one that `leads` tells.
    """

    files: tuple[ErasedOne, ...]
    stack: Stacked | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    verdict: str = ""
    seconds: float = 0.0
    leads: bool = True

    @property
    def failed(self) -> tuple[ErasedOne, ...]:
        return tuple(one for one in self.files if one.error)


@dataclass(frozen=True)
class _Job:
    """A row with its plan, its task as the base knows it, and what is there of it already."""

    plan: ErasePlan
    task: Task
    made: Header | None

    @property
    def name(self) -> str:
        return self.task.concepts[0]


def erase_all(asked: Plans, report: Report, base: Any = None) -> ErasedAll:
    """Carry all plans out; see `api.erase_all`."""
    began = time.monotonic()
    first = asked.plans[0]
    # 1. the base, and all that can be known to be wrong before anything is made
    team = Team(first.device)
    here = find_base(base or first.base, team.device, first.dtype, first.prediction)
    report.phase(described(here))
    names = [row.name for row in asked.rows]
    jobs = [_job(here, row, plan, names) for row, plan in zip(asked.rows, asked.plans, strict=True)]
    _check(jobs, asked.force)
    asked.folder.mkdir(exist_ok=True)
    # 2. this process's share; one that is stopped or lost says what is missing

    def missing() -> list[str]:
        return [job.name for job in jobs if not _made(here, job.plan, job.task)]

    with launched.telling(missing, len(jobs), "concepts"), _only_run(asked.folder, team), states.shared():
        files = tuple(team.gather(_all_done(here, team.share(jobs), len(jobs), report)))
    # 3. the stack of all, once it acts, and how it does
    done = ErasedAll(files, seconds=time.monotonic() - began, leads=team.leads)
    if done.failed or not (team.leads or asked.measured):
        return done
    whole = concept_list.stacked(asked)
    admission.admit(here, whole, True, report)
    stack = _write(here, asked, whole, report) if team.leads else None
    with launched.drawing(team):
        found = _judged(here, jobs, whole, report) if asked.measured else Closing()
    if not team.leads:
        return done
    left = [replace(one, left=found.shown.get(one.concept)) for one in files]
    done = replace(done, files=tuple(left), stack=stack, scores=found.scores, verdict=found.verdict)
    done = replace(done, seconds=time.monotonic() - began)
    hint = "see which in the table; for these try another anchor, method or more --steps"
    verdict.check_gone(done, done.scores, "of the stack still show what was to go", hint)
    return done


# before anything is made


def _job(base: Base, row: concept_list.Row, plan: ErasePlan, names: Sequence[str]) -> _Job:
    try:
        task = erasing.fitting_task(base, plan, Report())
        staying = _staying(base, plan, task, names)
        if staying is not plan:
            plan, task = staying, erasing.fitting_task(base, staying, Report())
    except UsageError as error:
        raise UsageError(f"{row.place}: {error}", error.hint) from error
    return _Job(plan, task, _made(base, plan, task))


def _staying(base: Base, plan: ErasePlan, task: Task, names: Sequence[str]) -> ErasePlan:
    """The plan with an anchor that is no concept of the list, where nobody chose one; its command says it."""
    gone = {name.casefold() for name in names}
    if plan.given_anchors or (task.anchors[0] or "").casefold() not in gone:
        return plan
    anchor = lessons.nearest(base, task.concepts[0], task.kinds[0] or "", names)
    request = {**plan.request, "anchors": (anchor,)}
    return replace(plan, task=replace(plan.task, anchors=(anchor,)), request=request)


def _made(base: Base, plan: ErasePlan, task: Task) -> Header | None:
    """The header of the file that is there, where a run of this very plan on this very base made it."""
    try:
        found = format.load(plan.output)
    except FormatError:
        return None
    head = found.header
    made = dict(head.made[0]) if len(head.made) == 1 else {}
    record = made.pop("harden", {})
    size = hardening.BUDGETS[plan.harden].digest if plan.harden else None
    told = (record.get("budget"), record.get("size")) if isinstance(record, Mapping) else ()
    wanted = erasing.provenance(plan, task)
    same = (head.concepts, head.anchors, head.base.id) == (task.concepts, task.anchors, base.id)
    alike = canonical_json(made) == canonical_json(wanted) and told == (plan.harden, size) and same
    return head if alike and not admission.is_foreign(base, found) else None


def _check(jobs: Sequence[_Job], force: bool) -> None:
    """Raise `UsageError` where a file is there that somebody else, or another plan, made."""
    taken = [job.plan.output for job in jobs if not job.made and job.plan.output.exists()]
    if taken and not force:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        message = f"{escape(taken[0])} exists and was made in another way{more}"
        raise UsageError(message, "name another --output, or use --force: what still fits is kept")


@contextmanager
def _only_run(folder: Path, team: Team) -> Iterator[None]:
    """Hold the folder against a second run; the system lets go when the process dies."""
    if not team.leads:
        yield
        return
    with locked(folder):
        yield


# the concepts


@dataclass
class _Start:
    """What there is of a concept's edits before its turn, after so many seconds: all, none, or why not."""

    edits: Sequence[Edit] = ()
    error: Exception | None = None
    seconds: float = 0.0


def _all_done(
    base: Base, share: Sequence[tuple[int, _Job]], total: int, report: Report
) -> list[ErasedOne]:
    """Make the files of this process's share, some concepts at a time."""
    done: list[ErasedOne] = []
    for first in range(0, len(share), TOGETHER):
        some = share[first : first + TOGETHER]
        starts = _solved(base, [(number, job) for number, job in some if not job.made], total, report)
        done += [_done(base, job, starts.get(number, _Start()), f"{number} of {total}", report)
                 for number, job in some]  # fmt: skip
    return done


def _solved(
    base: Base, jobs: Sequence[tuple[int, _Job]], total: int, report: Report
) -> dict[int, _Start]:
    """The edits of those concepts whose methods can be solved together, by number."""
    # 1. what each has to solve; prompts that an earlier one has read are not read again
    asked: dict[int, list[solving.Unsolved]] = {}
    starts = {number: _Start() for number, _ in jobs}
    for number, job in jobs:
        began = time.monotonic()
        try:
            if parts := erasing.unsolved(job.plan, base, job.task, report):
                asked[number] = parts
        except Exception as raised:
            starts[number].error = raised
        starts[number].seconds = time.monotonic() - began
    # 2. all of it at once; where that fails, each by itself says why
    if asked:
        report.phase(f"solving {len(asked)} of {total} together")
        try:
            for number, edits in zip(asked, solving.solved(list(asked.values())), strict=True):
                starts[number].edits = edits
        except (RuntimeError, MemoryError):
            report.note("they are solved one by one, for together they are not")
    return starts


def _done(base: Base, job: _Job, start: _Start, which: str, report: Report) -> ErasedOne:
    """Make a concept's file, unless it is there; what goes wrong is its error."""
    plan, task = job.plan, job.task
    about = ErasedOne(job.name, task.anchors[0] or "", task.kinds[0], plan.method, plan.output)
    if job.made:
        return _told(replace(about, kept=True), plan, _not_erased(job.made))
    report.note(f"{which}: {job.name}")
    began, error = time.monotonic() - start.seconds, start.error
    try:
        if error is None:
            _erased(base, plan, report, start.edits)
    except Exception as raised:
        error = raised
    return _told(replace(about, seconds=time.monotonic() - began), plan, error)


def _erased(base: Base, plan: ErasePlan, report: Report, solved: Sequence[Edit] = ()) -> None:
    """Take up a training that was stopped, where it is of this plan; else begin anew."""
    if any(plan.checkpoints.glob("*/step-*")):
        try:
            erasing.erase(plan, report, True, base)
            return
        except MismatchError:
            report.note(f"{plan.task.concepts[0]}: what was begun is of another plan, so it begins anew")
    erasing.erase(plan, report, False, base, solved)


def _told(one: ErasedOne, plan: ErasePlan, error: Exception | None) -> ErasedOne:
    """With what its file is, and what went wrong."""
    try:
        found = format.read_header(plan.output)
        one = replace(one, bytes=found.bytes, digest=found.digest)
    except FormatError as unread:
        error = error or unread
    if error is None:
        return one
    return replace(one, error=failing.record(error, ALONE), command=plan.command())


def _not_erased(head: Header) -> ThresholdError | None:
    """What `erase` said of a file that is kept and whose own figures still see the concept."""
    leak = head.scores.get("leak")
    if not leak or not leak["value"] > verdict.LEAKS:
        return None
    return ThresholdError(f"not erased: {leak['value']:.0%} of {leak['n']} pictures still show it")


# the stack


def _write(base: Base, asked: Plans, whole: Erasure, report: Report) -> Stacked:
    """Write the stack; one that is there already stays, and no other is overwritten without `force`."""
    paths = [plan.output for plan in asked.plans]
    if asked.stack.exists() and not asked.force and _digest(asked.stack) != whole.digest:
        raise UsageError(f"{escape(asked.stack)} exists and is another stack", "use --force to replace it")
    return stacking.write(paths, asked.stack, True, report, base)


def _digest(path: Path) -> str:
    try:
        return format.read_header(path).digest
    except FormatError:
        return ""


def _judged(base: Base, jobs: Sequence[_Job], whole: Erasure, report: Report) -> Closing:
    """The closing figures of all concepts together."""
    tasks = [job.task for job in jobs]
    names, anchors, kinds = zip(*(task.triples[0] for task in tasks), strict=True)
    settings = replace(usual(base), batch=erasing.CLOSING_BATCH)
    report.phase("measuring what is erased and what is kept")
    each = max(1, PICTURES // len(jobs))
    edits = whole.with_role("erase")
    return closing(base, edits, Task(names, anchors, (), kinds), settings, jobs[0].plan.seed, report, each)
