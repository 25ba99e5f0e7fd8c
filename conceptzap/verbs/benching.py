"""A bench, cell by cell: every finished one is kept at once, so that the same command goes on after a kill.

A folder holds `bench.toml` (the request, written first), `erasures/` with what each cost, `cells/`,
`attacks/` with a page each, and at the end `bench.json`, `bench.csv`, `bench.md` and `bench.html`. Under
`accelerate launch` each process takes its share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

import conceptzap
from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.edit import Json, canonical_json
from conceptzap.errors import ThresholdError, UsageError, escape
from conceptzap.evaluation import matrix, run, suites
from conceptzap.evaluation.matrix import Bench, Cell, Job, Matrix
from conceptzap.evaluation.run import Experiment
from conceptzap.format import atomic, naming
from conceptzap.page import attack as attack_page
from conceptzap.page import bench as page
from conceptzap.redteam.victim import SEARCHED
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.training import memory
from conceptzap.trust import admission
from conceptzap.verbs import attacking, erasing, evaluating, failing, launched, planning
from conceptzap.verbs.generating import described
from conceptzap.verbs.launched import Team

ERASURES, CELLS, REQUEST = "erasures", "cells", "bench.toml"
MAKING = ("preparing", "learning")  # phases of `erase` that a method costs; the rest is the same for all
BUDGET = "quick"  # of every attack
HINT = "run it alone with `conceptzap erase`, `evaluate`"
ANOTHER = "name another folder, or use --force: what still fits is kept"


def bench(
    path: Path | str | None, given: Mapping[str, Any], output: Path | str, force: bool, report: Report
) -> Bench:
    """See `api.bench`."""
    # 1. all that can be known to be wrong before anything is made
    asked = matrix.settle(path, given)
    folder = naming.place(output)
    again = _prepare(folder, asked, force)
    _check(asked, _nearest(folder))
    team = Team(asked.device)
    base = load_base(asked.base, team.device, asked.dtype, asked.prediction)
    report.phase(described(base))
    for name in (ERASURES, CELLS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if team.leads:
        atomic.write_atomic(folder / REQUEST, tomli_w.dumps(asked.record()).encode(), force=True)
    # 2. this process's share of the jobs
    every = [Cell(job, suite) for job in asked.jobs for suite in asked.columns]

    def missing() -> list[str]:
        return [cell.name for cell in every if not _read(folder, asked, cell)]

    with launched.telling(missing, len(every), "cells"):
        for number, job in team.share(asked.jobs):
            report.note(f"{number} of {len(asked.jobs)}: {job.method}, {job.concept}")
            for cell in _cells(_Work(asked, folder, base, again, report), job):
                _keep(folder / CELLS / f"{cell.name}.json", asked, cell)
        team.wait()
    # 3. all cells, whoever made them
    cells = [_read(folder, asked, cell) for cell in every]
    done = Bench(asked, tuple(filter(None, cells)), leads=team.leads)
    written = page.write(done, folder) if done.leads else {}
    return replace(done, written=written)


def _prepare(folder: Path, asked: Matrix, force: bool) -> bool:
    """Whether the folder already holds this very bench; `UsageError` where it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{escape(folder)} is not a folder", "name a folder to --output")
    if (folder / REQUEST).exists():
        old, new = config.read_toml(folder / REQUEST), asked.record()
        differs = sorted(key for key in old | new if old.get(key) != new.get(key))
        if differs and not force:
            message = f"{escape(folder)} holds a bench that differs in {', '.join(differs)}"
            raise UsageError(message, ANOTHER)
        return not differs
    taken = [name for name in page.NAMES.values() if (folder / name).exists()]
    if taken and not force:
        raise UsageError(f"{escape(folder / taken[0])} exists", "name another folder or use --force")
    return False


def _check(asked: Matrix, near: Path) -> None:
    """Raise `UsageError` for methods, settings, concepts and suites that mean nothing, whatever the base."""
    for job in asked.jobs:
        _plan(asked, job, near / f"{job.name}{naming.SUFFIX}")
    for name in asked.suites:
        about = suites.limited(suites.load(name)[0], asked.limit)
        suites.settings(about, asked.steps, asked.guidance, asked.batch)
    for name in asked.attacks:
        attacking.settled(name, BUDGET, {})


def _nearest(folder: Path) -> Path:
    """The folder itself, or the one above in which it would be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _plan(asked: Matrix, job: Job, output: Path) -> planning.ErasePlan:
    return planning.resolve(
        job.concept, anchors=job.anchor or (), method=job.method, preset=asked.preset,
        overrides=asked.settings.get(job.method, {}), base=asked.base, prediction=asked.prediction,
        seed=asked.seed, device=asked.device, dtype=asked.dtype, output=output, force=True,
        preview=False, limit=0,  # the suites measure it
        harden=planning.budget_of_many(asked.preset),
    )  # fmt: skip


class _Work:
    """What every job of a bench needs. `again`: the folder held this bench before, perhaps half of it."""

    def __init__(self, asked: Matrix, folder: Path, base: Base, again: bool, report: Report) -> None:
        self.asked, self.folder, self.base = asked, folder, base
        self.again, self.report = again, report


def _cells(work: _Work, job: Job) -> Iterator[Cell]:
    """The cells of a job that are not kept yet. What is wrong with one is its error; the next goes on."""
    wanted = [Cell(job, suite) for suite in work.asked.columns]
    open_ = [cell for cell in wanted if not _is_kept(work, cell)]
    settled: list[tuple[Cell, Experiment]] = []
    for cell in open_:
        try:  # before anything is trained: does the suite know the concept, is its judge there?
            settled.append((cell, _experiment(work, cell)))
        except Exception as error:
            yield replace(cell, error=failing.record(error, HINT))
    made: Cell | None = None
    for cell, experiment in settled:
        try:
            made = made or _erased(work, job)
            yield _measured(work, replace(made, suite=cell.suite), experiment)
        except Exception as error:
            yield replace(made or cell, suite=cell.suite, error=failing.record(error, HINT))


def _is_kept(work: _Work, cell: Cell) -> bool:
    kept = _read(work.folder, work.asked, cell)
    return kept is not None and not kept.error and (work.folder / kept.file).is_file()


def _experiment(work: _Work, cell: Cell) -> Experiment:
    asked, suite = work.asked, work.asked.suites[0] if cell.attack else cell.suite
    return evaluating.settle(
        work.base, suite, [cell.job.concept], judges=asked.judges, seed=asked.seed, **asked.look
    )


def _erased(work: _Work, job: Job) -> Cell:
    """The job's erasure with its costs, kept from an earlier run or made now."""
    path = work.folder / ERASURES / f"{job.name}{naming.SUFFIX}"
    note = path.with_name(f"{job.name}.json")
    budget = _budget(work.asked, job)
    kept = _json(note)
    if kept.get("budget") == budget and path.exists() and format.read_header(path).digest == kept["digest"]:
        return Cell(job, "", **{key: value for key, value in kept.items() if key != "budget"})
    training = path.with_name(f".{job.name}.training")
    plan = _plan(work.asked, job, path)
    memory.forget_peak()
    try:
        made = erasing.erase(plan, work.report, work.again and training.exists(), work.base)
    except ThresholdError as error:  # not erased is a figure like another
        made = error.made
    cell = Cell(
        job, "", file=f"{ERASURES}/{path.name}", bytes=made.bytes, digest=made.digest,
        seconds=round(sum(made.phases[name] for name in MAKING if name in made.phases), 3),
        peak_bytes=made.peak_bytes,
    )  # fmt: skip
    costs = {key: getattr(cell, key) for key in ("file", "bytes", "digest", "seconds", "peak_bytes")}
    atomic.write_atomic(note, canonical_json({"budget": budget, **costs}).encode(), force=True)
    return cell


def _measured(work: _Work, cell: Cell, experiment: Experiment) -> Cell:
    loaded = admission.load_all([work.folder / cell.file])
    admission.admit_all(work.base, [one.erasure for one in loaded], False, work.report)
    if cell.attack:
        chosen = attacking.settled(cell.attack, BUDGET, {}, work.asked.limit)
        done = attacking.carry_out(chosen, work.base, loaded, experiment, work.report)
        attack_page.write(done, work.folder / page.ATTACKS / cell.name, force=True)
        return replace(cell, result=done.result())
    return replace(cell, result=run.evaluate(work.base, loaded, experiment, work.report).result)


# what is kept


def _budget(asked: Matrix, job: Job) -> dict[str, Json]:
    """What a kept cell must have been made with, as JSON gives it back."""
    about = {"version": conceptzap.__version__, "anchor": job.anchor, **asked.budget(job.method)}
    return json.loads(canonical_json(about))


def _terms(asked: Matrix, cell: Cell) -> dict[str, Json]:
    """The same of a cell of an attack, whose searches may have come to mean something else."""
    return _budget(asked, cell.job) | ({"searched": SEARCHED} if cell.attack else {})


def _keep(path: Path, asked: Matrix, cell: Cell) -> None:
    record = {"budget": _terms(asked, cell), **cell.record(), **cell.costs()}
    atomic.write_atomic(path, canonical_json(record).encode(), force=True)


def _read(folder: Path, asked: Matrix, cell: Cell) -> Cell | None:
    """A cell as it was kept; None where it was not, or with another budget."""
    record = _json(folder / CELLS / f"{cell.name}.json")
    if record.pop("budget", None) != _terms(asked, cell):
        return None
    try:
        return Cell.from_record(record)
    except (KeyError, TypeError, UsageError):
        return None


def _json(path: Path) -> dict[str, Any]:
    """A file of ours; {} where there is none, or none that is whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
