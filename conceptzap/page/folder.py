"""The folder of an evaluation: result.json, report.html, cells.csv and one contact sheet a slice."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conceptzap.errors import UsageError, escape
from conceptzap.evaluation.scoring import Evaluation
from conceptzap.evaluation.trial import View
from conceptzap.format import atomic, naming
from conceptzap.format.pictures import save_png, side_by_side
from conceptzap.page import report
from conceptzap.page.samples import Strip, strips

RESULT, REPORT, CELLS, IMAGES = "result.json", "report.html", "cells.csv", "images"
NAMES = {"result": RESULT, "report": REPORT, "cells": CELLS}


def prepare(output: Path | None, paths: Sequence[Path], suite: str, force: bool) -> Path:
    """The folder to write to, checked before any work: `<file>-<suite>` here unless it is named.

    Raises `UsageError` where results lie there already (without `force`) or it is no folder.
    """
    stem = paths[0].name.removesuffix(naming.SUFFIX) if len(paths) == 1 else "stack"
    folder = output or Path(f"{naming.slug(stem)}-{suite}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{escape(folder)} is not a folder", "name a folder to --output")
    taken = [name for name in NAMES.values() if (folder / name).exists()]
    if taken and not force:
        raise UsageError(f"{escape(folder / taken[0])} exists", "name another folder or use --force")
    near = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    atomic.check_writable(near / RESULT, force=True)
    return folder


def write(done: Evaluation, folder: Path, force: bool) -> dict[str, Path]:
    """Write everything; the result last, so that where it lies the rest does too."""
    shown = strips(done)
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for strip in shown:
        sheet = side_by_side(_rows(strip))
        path = folder / IMAGES / f"{strip.slice.replace('/', '-')}.png"
        save_png(path, sheet, {"slice": strip.slice, "suite": done.result.suite}, force=True)
    atomic.write_atomic(folder / CELLS, _cells(done).encode(), force)
    atomic.write_atomic(folder / REPORT, report.html(done, shown).encode(), force)
    record = json.dumps(done.result.record(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    atomic.write_atomic(folder / RESULT, record.encode(), force)
    return {"folder": folder, **{key: folder / name for key, name in NAMES.items()}}


def _rows(strip: Strip) -> list[tuple[str, list[np.ndarray]]]:
    return [("base", list(strip.before)), ("erased", list(strip.after))]


def _cells(done: Evaluation) -> str:
    """One line a cell: what was asked, what each judge saw before and after."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["slice", "concept", "prompt", "seed", "expect", "before", "after", "valid before", "valid after"]
    )
    for cell in done.trial.cells:
        probe = cell.probe
        expect = "; ".join(f"{kind}={label}" for kind, label in probe.expect)
        seen = [_first(view) for view in (cell.before, cell.after)]
        valid = [int(cell.before.valid), int(cell.after.valid)]
        asked = [probe.slice, probe.concept, probe.prompt, probe.seed]
        writer.writerow([_inert(value) for value in (*asked, expect, *seen, *valid)])
    return buffer.getvalue()


def _inert(value: object) -> object:
    """A text that a spreadsheet would take for a formula, quoted so that it is one no more."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def _first(view: View) -> str:
    """The first label of every judge: `object=cat|fox; style=photo|photo`."""
    kinds = (
        f"{kind}={'|'.join(ranked[0] if ranked else '-' for ranked in rankings)}"
        for kind, rankings in view.labels.items()
    )
    return "; ".join(kinds)
