"""The verbs for a list of concepts: a file each, and their stack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap.edit import Json
from conceptzap.report import Bars, Report, begun
from conceptzap.verbs import concept_list, doubts

if TYPE_CHECKING:
    from conceptzap.verbs.generating import AnyBase
    from conceptzap.verbs.many import ErasedAll


def plan_all(
    concepts: Path | str | Iterable[str | Mapping[str, Any]],
    *,
    anchors: str | None = None,
    keep: Sequence[str] | str = (),
    kind: str | None = None,
    method: str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    base: Path | str = "demo", prediction: str | None = None,
    seed: int = 0, steps: int | None = None,
    device: str = "auto", dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
    preview: bool = False,
    log_with: Sequence[str] | str = (), sample_every: int = 0,
    harden: str | None = None,
    after: Sequence[Path | str] | Path | str = (),
    limit: int | None = None,
    patience: int | None = None,
    report: Report | None = None,
) -> dict[str, Json]:  # fmt: skip
    """What `erase_all` with the same arguments would do; it raises what can be raised now."""
    asked = concept_list.resolve(
        concepts, anchors=() if anchors is None else (anchors,), keep=keep, kind=kind or (), method=method,
        preset=preset, overrides=overrides, base=base, prediction=prediction, seed=seed, steps=steps,
        device=device, dtype=dtype, output=output, force=force, preview=preview, log_with=log_with,
        sample_every=sample_every, harden=harden, after=after, limit=limit, patience=patience,
    )  # fmt: skip
    for plan in asked.plans:
        doubts.warn(plan.task, report or Bars())
    return asked.record()


def erase_all(
    concepts: Path | str | Iterable[str | Mapping[str, Any]],
    *,
    anchors: str | None = None,
    keep: Sequence[str] | str = (),
    kind: str | None = None,
    method: str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    base: AnyBase = "demo", prediction: str | None = None,
    seed: int = 0, steps: int | None = None,
    device: str = "auto", dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
    preview: bool = False,
    log_with: Sequence[str] | str = (), sample_every: int = 0,
    harden: str | None = None,
    after: Sequence[Path | str] | Path | str = (),
    limit: int | None = None,
    patience: int | None = None,
    report: Report | None = None,
) -> ErasedAll:  # fmt: skip
    """Erase every concept of a list: one file each, the bytes that `erase` gives, and their stack.

    `concepts` is a TOML or CSV file, or rows: names, or mappings of name, anchor, keep, method and kind.
    The other arguments are those of `erase` and hold where a row says nothing, but nothing is hardened
    unless `harden` or the preset says so; without an anchor a concept becomes the nearest that is not on
    the list itself. The stack is `output`, by default called after the file, and the folder of the same
    name gets a file each. What is there and was made by the same plan is kept, so the same call goes on
    after a kill; under `accelerate launch` each process makes its share. `limit`: pictures of a concept
    that its own file is judged by, none unless given; the stack of all is judged at the end, unless
    `limit` is 0.

    A concept that fails is told of in `failed` of what comes back, the others go on, and there is no
    stack then. Raises `UsageError` with file and line before anything is made, `Interrupted` with what is
    missing, and `ThresholdError` where the stack still shows the concepts: its `made` is what was made.
    """
    asked = concept_list.resolve(
        concepts, anchors=() if anchors is None else (anchors,), keep=keep, kind=kind or (), method=method,
        preset=preset, overrides=overrides, prediction=prediction, seed=seed, steps=steps, device=device,
        base=base if isinstance(base, (str, PathLike)) else getattr(base, "id", "pipeline"),
        dtype=dtype, output=output, force=force, preview=preview, log_with=log_with,
        sample_every=sample_every, harden=harden, after=after, limit=limit, patience=patience,
    )  # fmt: skip
    for plan in asked.plans:
        doubts.warn(plan.task, report or Bars())
    report = begun(report)
    from conceptzap.verbs import many

    return many.erase_all(asked, report, base)
