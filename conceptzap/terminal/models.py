"""What `inspect` says of checkpoints, of LoRAs and of whole folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conceptzap.terminal.listing import full, shown, size, table
from conceptzap.terminal.speech import console, is_quiet, lines

NOT_SAID = "not said"


def record(model: Any) -> dict[str, Any]:
    """What `inspect --json` says of a checkpoint or a LoRA."""
    return {
        "path": full(model.path),
        "bytes": model.bytes,
        "kind": model.kind,
        "family": model.family,
        "prediction": model.prediction,
        "parts": dict(model.parts),
        "erased": dict(model.erased),
    }


def show(found: Mapping[str, Any]) -> None:
    """One checkpoint or LoRA for people."""
    if is_quiet():
        lines([found["path"]])
        return
    parts = ", ".join(f"{name} {size(count)}" for name, count in found["parts"].items())
    rows = [
        ("path", found["path"]),
        ("kind", found["kind"]),
        ("size", f"{size(found['bytes'])}: {parts}"),
        ("family", found["family"] or NOT_SAID),
        *([("prediction", found["prediction"] or NOT_SAID)] if found["kind"] == "checkpoint" else []),
        ("erased", _erased(found["erased"])),
    ]
    console().print(table("", "", rows=rows))


def _erased(told: Mapping[str, Any]) -> str:
    """`Van Gogh (bacba1d92fe5)`: what an export of ours says went into it."""
    concepts = ", ".join(told.get("concepts", ()))
    digests = ", ".join(str(one.get("digest", ""))[:12] for one in told.get("erasures", ()))
    return f"{concepts} ({digests})" if concepts else "nothing, as far as it says"


def _effect(record: Mapping[str, Any]) -> str:
    """What it erases; a key restores it."""
    concepts = ", ".join(record["concepts"])
    return concepts if any(edit["role"] == "erase" for edit in record["edits"]) else f"(restores {concepts})"


def catalogue(records: Sequence[Mapping[str, Any]]) -> None:
    """The erasures of a folder, a line each."""
    if is_quiet():
        lines(one["digest"] for one in records)
        return
    rows = [
        (shown(one["path"]), _effect(one), one["base"]["id"], one["method"], size(one["bytes"]))
        for one in records
    ]
    console().print(table("file", "erases", "base", "method", ">size", rows=rows))
