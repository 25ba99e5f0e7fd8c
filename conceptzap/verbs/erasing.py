"""From a plan to files: load the base, run the method, measure, draw the picture, then write all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import conceptzap
from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure, Header, Json, sort_edits
from conceptzap.errors import (
    ConceptZapError,
    RefusedError,
    UsageError,
    escape,
)
from conceptzap.evaluation import verdict
from conceptzap.evaluation.closing import Closing, Drawn, closing
from conceptzap.format import atomic
from conceptzap.redteam import hardening
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import Score
from conceptzap.runtime.attach import installed
from conceptzap.runtime.gates import SIGHT, Signal, factor
from conceptzap.task import Task
from conceptzap.training import lessons, memory, wordings
from conceptzap.training.solving import Unsolved
from conceptzap.trust import admission, canary
from conceptzap.verbs import doubts, estimates, runs
from conceptzap.verbs import preview as preview_
from conceptzap.verbs.generating import described, find_base, usual
from conceptzap.verbs.planning import ErasePlan
from conceptzap.verbs.work import Phases, Work, plain

if TYPE_CHECKING:

    from conceptzap.verbs.generating import AnyBase

CLOSING_BATCH = 16
TOGETHER = 32  # prompts whose gates are looked at together
LONGEST = 4  # a concept may take up to a fourth of a prompt


@dataclass(frozen=True)
class ErasedFile:
    """What `erase` made: files, scores and the value itself.

    `scores` and `verdict`, one sentence that says them, are empty on a base without classifiers. `preview`
    is None where none was wanted, `key` where the method has none. `prompt` asks for something that
    shows the difference. `phases`: what it was doing -> seconds; `peak_bytes`: the most memory held.
    """

    path: Path
    bytes: int
    digest: str
    method: str
    seconds: float
    scores: Mapping[str, Score]
    preview: Path | None
    key: Path | None
    erasure: Erasure
    verdict: str = ""
    prompt: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    def record(self) -> dict[str, Json]:
        """What became of it, as a run's folder keeps it."""
        scores = {name: score.record() for name, score in self.scores.items()}
        about = ("verdict", "digest", "method", "bytes", "seconds", "peak_bytes")
        return {name: getattr(self, name) for name in about} | {"scores": scores, "phases": dict(self.phases)}


def erase(
    plan: ErasePlan,
    report: Report,
    resume: bool,
    base: AnyBase | None = None,
    solved: Sequence[Edit] = (),
) -> ErasedFile:
    """Carry a plan out; see `api.erase`. Nothing is written before all of it is made.

    `solved`: the method's edits, where they were made beforehand (`unsolved`).
    """
    with runs.logged(plan, report) as heard:
        made = _erased(plan, heard, resume, base, solved)
        runs.finish(plan, made.record())
    if isinstance(base, str | PathLike) and not resume:
        estimates.remember(plan, made.record())
    hint = "try more --steps, another --anchor or another --method"
    verdict.check_gone(made, made.scores, f"still show it (kept: {escape(made.path)})", hint)
    return made


def _erased(
    plan: ErasePlan, report: Report, resume: bool, base: AnyBase | None, solved: Sequence[Edit]
) -> ErasedFile:
    phases = Phases(report)
    # 1. the base, and what of the task it knows
    phases.enter("loading", f"loading {plan.base}")
    base = find_base(base or plan.base, plan.device, plan.dtype, plan.prediction)
    report.phase(described(base))
    task = fitting_task(base, plan, report)
    work = Work(plan, base, task, report, phases, resume)
    with work.resumable(), work.log:
        # 2. the method: prepares and learns
        phases.enter("preparing", f"preparing what {', '.join(task.concepts)} is learned from")
        edits, hardened = [*map(plain, solved)] or _edits(plan, base, task, work), {}
        if plan.harden:
            phases.enter("hardening", "looking for what gets past it")
            edits, hardened = _hardened(plan, base, task, edits, work)
        acting = _of(edits, "erase")
        # 3. is it gone, and what did that cost?
        phases.enter("measuring", "measuring what is erased and what is kept")
        settings = replace(usual(base), batch=CLOSING_BATCH)
        found = closing(base, acting, task, settings, plan.seed, report, plan.limit)
        # 4. the picture
        phases.enter("drawing", "drawing before and after")
        shown = drawn(base, task, acting, found, plan.seed, report) if plan.preview else None
        thumbnail = preview_.thumbnail(shown[0]) if shown else ""
        erasure, key = (
            _assemble(base, plan, task, edits, role, found.scores, hardened, thumbnail)
            for role in ("erase", "key")
        )
        picture = preview_.sheet(base, task, erasure, *shown) if shown else None
        # 5. the files, once the value acts as they will give it back
        phases.enter("writing", "checking and writing")
        admission.admit(base, erasure, True, report)
        _write(plan, [format.dumps(erasure), format.dumps(key) if key else None, picture])
    work.clear()
    phases.enter("")
    path, key_path, *preview = plan.targets
    return ErasedFile(
        path=path,
        bytes=path.stat().st_size,
        digest=erasure.digest,
        method=plan.method,
        seconds=sum(phases.seconds.values()),
        scores=found.scores,
        preview=preview[0] if preview else None,
        key=key_path if key else None,
        erasure=erasure,
        verdict=found.verdict,
        prompt=preview_.telling_prompt(base, task),
        phases=phases.seconds,
        peak_bytes=memory.peak_bytes(),
    )


def drawn(
    base: Base, task: Task, edits: Sequence[Edit], found: Closing, seed: int, report: Report
) -> tuple[Sequence[Drawn], Sequence[Drawn]]:
    """Pictures of the concepts and of the rest: those that were judged, or drawn for this."""
    if found.concept:
        return found.concept, found.kept
    return preview_.draw(base, task, edits, seed, usual(base), report)


# the task, against what the base knows


def fitting_task(base: Base, plan: ErasePlan, report: Report) -> Task:
    """The task with kinds, anchors and keep words settled: what the base knows, no concept among them.

    Raises `UsageError` for a concept or anchor that the base cannot know, or that is no name.
    """
    task = plan.task
    for word in (*task.concepts, *filter(None, plan.given_anchors)):
        check_known(base, word)
    task = lessons.settled(base, task, report)
    keep = task.keep
    if plan.fill_keep:
        keep = lessons.usual_keep(task.kinds)
    known = keepable(base, task.concepts, keep)
    strange = [word for word in keep if base.unknown_words(word)]
    if plan.request.get("keep") and strange:
        report.warn(f"{base.id} does not know {', '.join(map(repr, strange))}, so that is not kept")
    return replace(task, keep=known)


def keepable(base: Base, concepts: Iterable[str], words: Iterable[str]) -> tuple[str, ...]:
    """The words that the base knows and that are none of the concepts."""
    gone = {concept.lower() for concept in concepts}
    return tuple(w for w in words if not base.unknown_words(w) and w.lower() not in gone)


def check_known(base: Base, word: str) -> None:
    shown = repr(escape(word))
    length = base.token_count(word)
    if length > base.max_tokens // LONGEST:
        raise UsageError(f"{shown} is {length} tokens long", "name it in a few words")
    if unknown := base.unknown_words(word):
        raise UsageError(
            f"{base.id} does not know {shown} (it never learned {escape(unknown[0])!r})",
            doubts.instead(word, unknown[0], base.vocabulary(), base.id),
        )


# the method at work


def _edits(plan: ErasePlan, base: Base, task: Task, work: Work) -> list[Edit]:
    """The method's edits as a file gives them back: fp16 tensors, fp32 gates, all on the CPU."""
    member = family.load("methods", plan.method)
    settings = member.Config(**dataclasses.asdict(plan.settings))
    with installed(base, _before(plan, base, work)):
        return [plain(edit) for edit in member.erase(base, task, settings, work)]


def unsolved(plan: ErasePlan, base: Base, task: Task, report: Report) -> list[Unsolved]:
    """What the method of a plan has to solve; [] where it does more than that, or only by itself."""
    member = family.load("methods", plan.method)
    if not hasattr(member, "unsolved"):
        return []
    settings = member.Config(**dataclasses.asdict(plan.settings))
    heard = Report(plan.seed)
    heard.warn, heard.count = report.warn, report.count
    with installed(base, _before(plan, base, report)):
        return list(member.unsolved(base, task, settings, heard))


def _before(plan: ErasePlan, base: Base, report: Report) -> list[Edit]:
    """The edits of the erasures that the new one comes after, once these may act on the base."""
    loaded = admission.load_all(list(plan.after.values()))
    admission.admit_all(base, [one.erasure for one in loaded], False, report)
    return [edit for one in loaded for edit in one.edits]


def _hardened(
    plan: ErasePlan, base: Base, task: Task, edits: Sequence[Edit], work: Work
) -> tuple[list[Edit], dict[str, Json]]:
    """The edits with those behind gates that look at the picture, and how they stood the attacks."""
    with installed(base, _before(plan, base, work)):
        done = hardening.harden(base, task, _of(edits, "erase"), plan.harden, work)
    keys = [edit for edit in edits if edit.role != "erase"]
    return [*map(plain, done.edits), *keys], done.record


def _of(edits: Sequence[Edit], role: str) -> tuple[Edit, ...]:
    return sort_edits(edit for edit in edits if edit.role == role)


# the value


def _assemble(
    base: Base,
    plan: ErasePlan,
    task: Task,
    edits: Sequence[Edit],
    role: str,
    scores: Mapping[str, Score],
    hardened: Mapping[str, Json],
    thumbnail: str,
) -> Erasure | None:
    """The erasure of one role as its file will give it back; None where no edit has that role."""
    mine = _of(edits, role)
    if not mine:
        return None
    header = Header(
        title=", ".join(task.concepts) + ("" if role == "erase" else f" ({role})"),
        concepts=task.concepts,
        anchors=task.anchors,
        base=base.reference(site for edit in mine for site in edit.modules),
        made=(provenance(plan, task) | ({"harden": dict(hardened)} if hardened else {}),),
        scores=score_records(scores, plan.seed) if role == "erase" else {},
        canary=canaries(base, mine, task),
        thumbnail=thumbnail if role == "erase" else "",
    )
    return format.seal(Erasure(header, mine))


def score_records(scores: Mapping[str, Score], seed: int) -> dict[str, dict[str, Json]]:
    return {name: _score_record(score, seed) for name, score in scores.items()}


def _score_record(score: Score, seed: int) -> dict[str, Json]:
    numbers = {name: round(value, 6) for name, value in score.record().items()}
    return {**numbers, "better": score.better, "seeds": [seed]}


def versions() -> dict[str, str]:
    """Of conceptzap and what it computes with."""
    libraries = ("torch", "diffusers", "transformers")
    return {"conceptzap": conceptzap.__version__, **{name: version(name) for name in libraries}}


def provenance(plan: ErasePlan, task: Task) -> dict[str, Json]:
    """How an erasure was made, as its header says it."""
    return {
        "method": plan.method,
        "config": dataclasses.asdict(plan.settings),
        "kinds": list(task.kinds),
        "keep": list(task.keep),
        "seed": plan.seed,
        **({"after": list(plan.after)} if plan.after else {}),
        **({"patience": plan.patience} if plan.patience else {}),
        "versions": versions(),
    }


def canaries(base: Base, edits: Sequence[Edit], task: Task) -> dict[str, Json]:
    """One self-test for each set of gates: edits behind different gates open for different concepts."""
    groups: dict[tuple[str, ...], list[Edit]] = {}
    for edit in edits:
        groups.setdefault(tuple(sorted(gate.name for gate in edit.gates)), []).append(edit)
    asked = _asked(task)
    result: dict[str, Json] = {}
    for members in groups.values():
        prompt = _opening(base, members, asked) or asked[0]
        result |= _tests(base, members, [prompt, *task.concepts])
    return result


def _tests(base: Base, edits: Sequence[Edit], prompts: Sequence[str]) -> dict[str, Json]:
    """One self-test by the first prompt, or several where some edits find what they act on in others."""
    try:
        return canary.make(base, edits, prompts[0])
    except RefusedError:
        result, left = {}, list(edits)
        for prompt in dict.fromkeys(prompts):
            if mine := canary.acting(base, left, prompt):
                result |= canary.make(base, mine, prompt)
                left = [edit for edit in left if edit not in mine]
        if left:
            raise
        return result


def _asked(task: Task) -> list[str]:
    """Prompts that a self-test may use, the concepts' names first."""
    return [*task.concepts, *(p.concept for one in task.triples for p in _wordings(*one))]


def _wordings(concept: str, anchor: str | None, kind: str) -> list[wordings.Pair]:
    return wordings.pairs(concept, anchor or "", kind, wordings.wording(kind)["things"])


def _opening(base: Base, edits: Sequence[Edit], asked: Sequence[str]) -> str | None:
    """The first of some prompts for which the gates of all the edits open, by its own tokens.

    A self-test reads no more of the padding than it must.
    """
    if any(gate.kind == SIGHT for edit in edits for gate in edit.gates):
        return next((text for text in asked if len(canary.acting(base, edits, text)) == len(edits)), None)
    starts = (0, *range(1, len(asked), TOGETHER))  # most often it is the very first
    for start, stop in zip(starts, (*starts[1:], len(asked)), strict=True):
        texts = asked[start:stop]
        times = torch.full((len(texts),), float(canary.TIMESTEP), device=base.device)
        ends = torch.tensor([base.token_count(text) + 1 for text in texts], device=base.device)
        states = base.encode(texts).states  # [texts, length, width]
        own = torch.arange(states.shape[1], device=base.device) <= ends[:, None]
        signals = Signal(states * own[..., None], times)
        found = (factor(edit, signals).reshape(len(texts), -1).ne(0).any(1) for edit in edits)
        if (opens := torch.stack([*found]).all(0)).any():
            return texts[int(opens.int().argmax())]
    return None


# the files


def _write(plan: ErasePlan, contents: Sequence[bytes | None]) -> None:
    """Write the erasure, its key and its picture; an error says which of them are there by then."""
    kept: list[str] = []
    for path, data in zip(plan.targets, contents, strict=False):  # no target for a picture unwanted
        if data is None:
            continue
        try:
            atomic.write_atomic(path, data, plan.force)
        except ConceptZapError as error:
            if not kept:
                raise
            message = f"{error} (written before that: {', '.join(kept)})"
            raise type(error)(message, error.hint) from error
        kept.append(escape(path))
