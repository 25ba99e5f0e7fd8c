"""`erase --from FILE`: the options of `erase` over a list of concepts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conceptzap.cli import _errors
from conceptzap.errors import UsageError


def run(source: Path, request: Mapping[str, Any], dry_run: bool, as_json: bool) -> None:
    """Plan or erase; `request` as `erase` has it, with its lists of one for all."""
    from conceptzap import api
    from conceptzap.errors import ConceptZapError, ThresholdError
    from conceptzap.terminal import many, show
    from conceptzap.terminal.progress import Progress

    given = {**request, **{key: _one(request, key) for key in ("anchors", "kind")}}
    if dry_run:
        plans = api.plan_all(source, **given, report=Progress())
        show.emit("plan_all", plans) if as_json else many.plans(plans)
        return
    error: ConceptZapError | None = None
    try:
        done = api.erase_all(source, **given, report=Progress())
    except ThresholdError as raised:
        done, error = raised.made, raised
    if not done.leads:  # a launcher ends all processes as soon as one fails
        return
    if done.failed:
        hint = "fix what each says and give the same command again: what is finished is kept"
        error = ConceptZapError(f"{len(done.failed)} of {len(done.files)} concepts failed", hint)
    if as_json:
        bad = {"error": _errors.record(error)} if error else {}
        show.emit("erase_all", {**many.record(done), **bad})
    else:
        many.told(done)
    _errors.leave([error] if error else [], as_json)


def _one(request: Mapping[str, Any], key: str) -> str | None:
    """A list option that holds for every row, as the one text that it may be."""
    values = request[key]
    if len(values) > 1:
        option = "anchor" if key == "anchors" else key
        message = f"{len(values)} of --{option} for a list of concepts"
        raise UsageError(message, f"give a row its own {option}")
    return values[0] if values else None


def check(**given: object) -> None:
    """Raise `UsageError` for what cannot go with a list."""
    if given.pop("concepts"):
        raise UsageError("--from brings the concepts", "leave the others out, or add them to the file")
    for name, value in given.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is of one concept, --from of a list", f"leave {option} out")
