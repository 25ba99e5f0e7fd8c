"""The folder of an evaluation: result.json, report.html, cells.csv and one contact sheet a slice."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from conceptzap.errors import UsageError, escape
from conceptzap.evaluation.run import Evaluation
from conceptzap.format import atomic, naming
from conceptzap.format.pictures import save_png, side_by_side
from conceptzap.page import figures, report
from conceptzap.page.samples import Strip, strips
from conceptzap.report import Report

RESULT, REPORT, CELLS, IMAGES = "result.json", "report.html", "cells.csv", "images"
NAMES = {"result": RESULT, "report": REPORT, "cells": CELLS}


def usual(paths: Sequence[Path], suite: str) -> Path:
    """The folder of an evaluation when nobody names one: `<file>-<suite>` here."""
    stem = paths[0].name.removesuffix(naming.SUFFIX) if len(paths) == 1 else "stack"
    return Path(f"{naming.slug(stem)}-{suite}")


def prepare(folder: Path, force: bool, names: Iterable[str] = (*NAMES.values(), IMAGES)) -> Path:
    """The folder itself, once it is known that results can be written there, in files of these names.

    Raises `UsageError` where some lie there already (without `force`) or it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{escape(folder)} is not a folder", "name a folder to --output")
    taken = [name for name in names if (folder / name).exists()]
    if taken and not force:
        raise UsageError(f"{escape(folder / taken[0])} exists", "name another folder or use --force")
    near = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    atomic.check_writable(near / RESULT, force=True)
    return folder


def write(done: Evaluation, folder: Path, force: bool, watch: Report) -> dict[str, Path]:
    """Write everything; the result last, so that where it lies the rest does too."""
    shown = strips(done)
    page = report.html(done, shown, watch)
    record = json.dumps(done.result.record(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.hidden_folder(folder / IMAGES) as hidden:
        (hidden / IMAGES).mkdir()
        for strip in shown:
            about = {"slice": strip.slice, "suite": done.result.suite}
            save_png(hidden / IMAGES / f"{strip.slice.replace('/', '-')}.png", _sheet(strip), about)
        for name, text in ((CELLS, _cells(done)), (REPORT, page), (RESULT, record)):
            atomic.write_atomic(hidden / name, text.encode())
        atomic.put_entries(hidden, prepare(folder, force), RESULT)
    return {"folder": folder, **{key: folder / name for key, name in NAMES.items()}}


def _sheet(strip: Strip) -> object:
    """Base above erased, small pictures enlarged."""
    before, after = ([getattr(pair, when) for pair in strip.pairs] for when in ("before", "after"))
    scale = max(1, figures.PICTURE // max(before[0].shape[:2]))
    return side_by_side([("base", before), ("erased", after)], scale)


def _cells(done: Evaluation) -> str:
    """One line a sample: what was asked, what each judge saw before and after."""
    heads = "slice concept prompt seed expect before after".split()
    lines: list[Sequence[object]] = [[*heads, "valid before", "valid after"]]
    for sample in done.comparison.samples:
        probe = sample.probe
        expect = "; ".join(f"{kind}={label}" for kind, label in probe.expect)
        seen = [figures.firsts(annotation) for annotation in (sample.before, sample.after)]
        valid = [int(sample.before.valid), int(sample.after.valid)]
        lines.append([probe.slice, probe.concept, probe.prompt, probe.seed, expect, *seen, *valid])
    return rows(lines)


def rows(lines: Iterable[Iterable[object]]) -> str:
    """Lines of values as CSV, none of which a spreadsheet runs."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([_inert(value) for value in line] for line in lines)
    return buffer.getvalue()


def _inert(value: object) -> object:
    """A text that a spreadsheet would take for a formula, quoted so that it is one no more."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
