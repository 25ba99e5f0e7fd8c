"""The folder of one run (`erase --run-dir`): what was asked for, what was said, and what came of it.

    20261126-081500-van-gogh/
      config.toml      what `--config` takes: the same bytes again
      log.txt          every line that was said, with the seconds since the start
      metrics.jsonl    the losses of every step; samples/ where they are asked for
      checkpoints/     while it learns
      van-gogh.lprompt.safetensors, van-gogh.png
      result.json      the closing figures
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from conceptzap.edit import Json
from conceptzap.errors import ResourceError, escape
from conceptzap.format import atomic
from conceptzap.registry import config
from conceptzap.report import Report

if TYPE_CHECKING:
    from conceptzap.verbs.planning import ErasePlan

CONFIG, LOG, RESULT = "config.toml", "log.txt", "result.json"


class Logged(Report):
    """Says what the caller's report says, and writes the lines of it down."""

    def __init__(self, report: Report, file: object) -> None:
        super().__init__(report.seed)
        self.report, self.file, self.since = report, file, time.monotonic()
        self.progress, self.count = report.progress, report.count

    def note(self, text: str) -> None:
        self._write(text)
        self.report.note(text)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")
        self.report.warn(text)

    def phase(self, text: str) -> None:
        self._write(text)
        self.report.phase(text)

    def _write(self, text: str) -> None:
        print(f"{time.monotonic() - self.since:8.1f} s  {text}", file=self.file, flush=True)


@contextmanager
def logged(plan: ErasePlan, report: Report) -> Iterator[Report]:
    """The report, writing along into the run's folder, which is made here; as it is without one.

    Raises `ResourceError` where the folder cannot be made.
    """
    if plan.run is None:
        yield report
        return
    try:
        plan.run.mkdir(parents=True, exist_ok=True)
        file = open(plan.run / LOG, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        message = f"cannot write into {escape(plan.run)}: {error.strerror}"
        raise ResourceError(message, "make room or get the rights") from error
    with file:
        atomic.write_atomic(plan.run / CONFIG, config.to_toml(plan.config()), force=True)
        yield Logged(report, file)


def finish(plan: ErasePlan, record: dict[str, Json]) -> None:
    """Write what came of it, where there is a folder for it."""
    if plan.run is not None:
        atomic.write_atomic(plan.run / RESULT, json.dumps(record, indent=2).encode() + b"\n", force=True)
