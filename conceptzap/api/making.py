"""The verbs that make an erasure, or something else of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap.edit import Json
from conceptzap.report import Bars, Report, begun
from conceptzap.trust.admission import Asked, Source
from conceptzap.verbs import doubts, estimates, planning

if TYPE_CHECKING:
    from conceptzap.verbs.erasing import ErasedFile
    from conceptzap.verbs.exporting import Exported
    from conceptzap.verbs.generating import AnyBase
    from conceptzap.verbs.hardening import HardenedFile


def plan(
    concepts: Sequence[str] | str,
    *,
    anchors: Sequence[str] | str = (),
    keep: Sequence[str] | str = (),
    kind: Sequence[str] | str = (),
    method: str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    base: Path | str = "demo", prediction: str | None = None,
    seed: int = 0, steps: int | None = None,
    device: str = "auto", dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
    preview: bool = True,
    log_with: Sequence[str] | str = (), sample_every: int = 0,
    harden: str | None = None,
    after: Sequence[Path | str] | Path | str = (),
    limit: int | None = None,
    patience: int | None = None,
    run_dir: Path | str | None = None,
    report: Report | None = None,
) -> dict[str, Json]:  # fmt: skip
    """What `erase` with the same arguments would do, without doing it; it raises what can be raised now.

    `estimate` is what the last such run took on this machine: seconds, peak_bytes, bytes of the file, and
    whether its settings were the `same`; None where no run with this base and method has ended here.
    """
    planned = planning.resolve(
        concepts, anchors=anchors, keep=keep, kind=kind, method=method, preset=preset,
        overrides=overrides, prediction=prediction, seed=seed, steps=steps, device=device, dtype=dtype,
        base=base, output=output, force=force, preview=preview, log_with=log_with,
        sample_every=sample_every, harden=harden, after=after, limit=limit, patience=patience,
        run_dir=run_dir,
    )  # fmt: skip
    doubts.warn(planned.task, report or Bars())
    return {**planned.record(), "estimate": estimates.recall(planned)}


def erase(
    concepts: Sequence[str] | str,
    *,
    anchors: Sequence[str] | str = (),
    keep: Sequence[str] | str = (),
    kind: Sequence[str] | str = (),
    method: str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    base: AnyBase = "demo", prediction: str | None = None,
    seed: int = 0, steps: int | None = None,
    device: str = "auto", dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
    preview: bool = True,
    log_with: Sequence[str] | str = (), sample_every: int = 0,
    harden: str | None = None,
    after: Sequence[Path | str] | Path | str = (),
    limit: int | None = None,
    patience: int | None = None,
    run_dir: Path | str | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> ErasedFile:  # fmt: skip
    """Take concepts out of a base and write the erasure, its key if it has one, and a picture.

    `anchors` are what the concepts become, `keep` what must stay, `kind` style, object, person or
    unsafe; one for all or one each, chosen by the words where they are left out. `overrides` are
    settings of the `method`, `steps` its optimisation steps. Without `preview` no picture is drawn or
    written. `base` is a name, a path, a diffusers pipeline or a `Base`. With `resume` a stopped
    training is taken up. `log_with` names trackers (jsonl, tensorboard, wandb, trackio) that hear the
    losses, every `sample_every` steps a sample is drawn; both go into the folder `<stem>.logs`. `harden`,
    "quick" or "full": it gets a gate that looks at the picture, which was shown mixtures of the concept
    or what searches found, too; "none" for none, and unless told "quick" for the default method on the
    base "demo". `after` are files of erasures that are in force while it is learned, and whose digests it
    keeps. `limit`: at most so many pictures of a concept in the closing figures, 0 for none of them. With
    `patience`, learning ends once so many of its twenty checks in a row bring nothing more. `run_dir`:
    all of it, with configuration and log, goes into a folder there, `20261126-081500-van-gogh`; to
    `resume` a run, name its own folder.

    Raises `UsageError` before anything is trained, `Interrupted` with the command that goes on, and
    `ThresholdError` when the closing figures still see the concept: the file is kept, and what was
    made is the error's `made`.
    """
    planned = planning.resolve(
        concepts, anchors=anchors, keep=keep, kind=kind, method=method, preset=preset,
        overrides=overrides, prediction=prediction, seed=seed, steps=steps, device=device, dtype=dtype,
        base=base if isinstance(base, (str, PathLike)) else getattr(base, "id", "pipeline"),
        output=output, force=force, preview=preview, log_with=log_with, sample_every=sample_every,
        harden=harden, after=after, limit=limit, patience=patience, run_dir=run_dir,
    )  # fmt: skip
    doubts.warn(planned.task, report or Bars())
    report = begun(report)
    from conceptzap.verbs import erasing

    return erasing.erase(planned, report, resume, base)


def harden(
    erasure: Source,
    budget: str = "full",
    base: AnyBase = "demo",
    *,
    prediction: str | None = None,
    seed: int = 0,
    device: str = "auto", dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> HardenedFile:  # fmt: skip
    """Attack an erasure and write it again, with gates for wrong spelling, and for what the picture shows.

    `budget` is "quick" (seconds: no searches) or "full" (minutes); `output` is by default called after the
    erasure, with `-hardened`. What was hardened quickly can be hardened fully, all of it learned anew. What
    comes back has the counts of each round of attacks. Raises `UsageError` for what was hardened as much
    already, is a key alone, or would be overwritten.
    """
    report = begun(report)
    from conceptzap.verbs import hardening

    return hardening.harden(
        erasure, budget, base, prediction=prediction, seed=seed, device=device, dtype=dtype, output=output,
        force=force, report=report,
    )  # fmt: skip


def import_(
    file: Path | str,
    concepts: Sequence[str] | str = (),
    *,
    anchors: Sequence[str] | str = (),
    kind: Sequence[str] | str = (),
    form: str | None = None,
    base: AnyBase = "demo", prediction: str | None = None,
    seed: int = 0,
    device: str = "auto", dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
    preview: bool = True,
    report: Report | None = None,
) -> ErasedFile:  # fmt: skip
    """Make an erasure of somebody else's file on the base that it was made for.

    `form` is a name of the folder `imports` (lora, spm, uce, esd, cpe), found by the file's keys unless
    given; `concepts` is what it erases, `anchors` what that becomes, where the file does not say. It is
    measured as `erase` measures what it made, and `made[0]["imported"]` has the file's sha256.

    Raises `FormatError` for pickles and what is no such file, `MismatchError` with the first keys that do
    not fit the base (nothing of the file is imported then), `UsageError` where nobody names the concept,
    and `ThresholdError`, the file kept, when the closing figures still see it.
    """
    report = begun(report)
    from conceptzap.verbs import importing

    listed = [(one,) if isinstance(one, str) else tuple(one) for one in (concepts, anchors, kind)]
    return importing.import_(
        file, listed[0], anchors=listed[1], kind=listed[2], form=form, base=base, prediction=prediction,
        seed=seed, device=device, dtype=dtype, output=output, force=force, preview=preview,
        report=report,
    )  # fmt: skip


def export(
    erasures: Asked | Iterable[Asked],
    to: str,
    output: Path | str,
    *,
    base: AnyBase = "demo", prediction: str | None = None,
    rank: int | None = None, keys: str | None = None, dtype: str = "auto",
    force: bool = False,
    report: Report | None = None,
) -> Exported:  # fmt: skip
    """Write erasures, stacked, in the format `to` of the folder `exports`: lora, checkpoint or diffusers.

    The last is a folder that diffusers draws erased, gates and all, where conceptzap is installed. The
    others hold changes of weights that stand behind no gate, whole or not at all: `RefusedError`
    lists what does not fit, and is raised for keys. A LoRA holds dense changes by the `rank`
    largest components, with a warning of the error, under `keys` of kohya (usual), original (kohya's for
    SDXL), diffusers or peft (a folder). A checkpoint is read back and compared with
    the attached edits before it gets its name. `dtype` auto is the narrowest that loses nothing.
    Raises `UsageError` for an `output` that exists, unless `force`.
    """
    from conceptzap.verbs import exporting

    return exporting.export(
        erasures, to, output, base=base, prediction=prediction, rank=rank, keys=keys, dtype=dtype,
        force=force, report=report or Bars(),
    )  # fmt: skip
