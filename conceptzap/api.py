"""The verbs, from `erase` to `verify`, and `load`, `save`, `inspect`. No logic of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap import edit, format
from conceptzap.edit import Erasure, Json
from conceptzap.format import naming
from conceptzap.report import Bars, Report
from conceptzap.trust import admission
from conceptzap.trust.admission import Asked, Source
from conceptzap.verbs import doubts, generating, inspecting, planning, stacking
from conceptzap.verbs.generating import Picture
from conceptzap.verbs.stacking import Stacked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from conceptzap.evaluation.matrix import Bench
    from conceptzap.evaluation.run import Evaluation
    from conceptzap.redteam.outcome import Attacked
    from conceptzap.result import Result
    from conceptzap.trust.policy import Policy
    from conceptzap.verbs.applying import Handle
    from conceptzap.verbs.erasing import ErasedFile
    from conceptzap.verbs.exporting import Exported
    from conceptzap.verbs.generating import AnyBase
    from conceptzap.verbs.hardening import HardenedFile

inspect = format.read_header
examine = inspecting.examine
load = format.load


def save(erasure: Erasure, path: Path | str, force: bool = False) -> str:
    """Write an erasure, its name with the suffix; its digest.

    Raises `FormatError` for one that could not be read back, `UsageError` where the file exists.
    """
    return format.save(erasure, naming.erasure_path((), path), force)


def stack(items: Iterable[Source]) -> Erasure:
    """One erasure from several, whatever their order; paths are read. The same one counts once.

    Raises `MismatchError` when they are for different architectures or checkpoints.
    """
    return format.seal(edit.stack([admission.read(item) for item in items]))


def stack_files(
    paths: Sequence[Path | str],
    output: Path | str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Stacked:
    """Write the stack of these files: by default here, called after all that it erases.

    Warns of a concept that is erased more than once, and of keys alone. Raises as `stack` does.
    """
    return stacking.write(paths, output, force, report or Bars())


def plan(
    concepts: Sequence[str] | str, *, report: Report | None = None, **request: Any
) -> dict[str, Json]:
    """What `erase` with the same arguments would do, without doing it."""
    planned = planning.resolve(concepts, **request)
    doubts.warn(planned.task, report or Bars())
    return planned.record()


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
    "quick" or "full": it is attacked while it is made, and gets a gate that looks at the picture.

    Raises `UsageError` before anything is trained, `Interrupted` with the command that goes on, and
    `ThresholdError` when the closing figures still see the concept: the file is kept, and what was
    made is the error's `made`.
    """
    planned = planning.resolve(
        concepts, anchors=anchors, keep=keep, kind=kind, method=method, preset=preset,
        overrides=overrides, prediction=prediction, seed=seed, steps=steps, device=device, dtype=dtype,
        base=base if isinstance(base, (str, PathLike)) else getattr(base, "id", "pipeline"),
        output=output, force=force, preview=preview, log_with=log_with, sample_every=sample_every,
        harden=harden,
    )  # fmt: skip
    report = report or Bars()
    doubts.warn(planned.task, report)
    report.phase("loading torch")
    from conceptzap.verbs import erasing

    return erasing.erase(planned, report, resume, base)


def harden(erasure: Source, budget: str = "quick", base: AnyBase = "demo", **options: Any) -> HardenedFile:
    """Attack an erasure and write it again, with a gate that looks at the picture beside its own.

    `budget` is "quick" or "full", `options` are those of `verbs.hardening.harden`: output, force, seed.
    """
    from conceptzap.verbs import hardening

    return hardening.harden(erasure, budget, base, **{"report": Bars(), **options})


def generate(
    prompts: Sequence[str] | str,
    *,
    erasures: Asked | Iterable[Asked] = (),
    base: AnyBase = "demo", prediction: str | None = None,
    seed: int = 0, count: int = 1,
    steps: int | None = None, guidance: float | None = None,
    negative: str = "",
    width: int | None = None, height: int | None = None,
    sampler: str | None = None, batch: int = 1,
    strengths: Iterable[float] = (1.0,),
    device: str = "auto", dtype: str = "auto",
    policy: Path | str | None = None,
    strict: bool = False,
    report: Report | None = None,
) -> Iterator[Picture]:  # fmt: skip
    """Draw `count` pictures of every prompt, picture k with seed `seed` + k, under the erasures.

    `erasures` are paths or values, or pairs of one and its strength (0 to 2); the same one twice
    counts once. All pictures are drawn once for each of `strengths`, by which those of the erasures
    are multiplied: `(0, 0.5, 1)` draws them by the base alone, at a half, and as asked for. Under a
    `policy` its own files are in force, as they are. `base` is a name, a path, a diffusers
    pipeline or a `Base`; `width` and `height` in pixels are the checkpoint's own unless given,
    `sampler` one of ddim, euler and dpm++.

    Nothing is drawn before the first picture is taken from what comes back. Requests and files are
    checked at the call, the base when the first picture is asked for. Raises `SilentEditError`
    rather than giving out a picture that an edit did not take part in.
    """
    look = {
        "steps": steps, "guidance": guidance, "negative": negative, "batch": batch,
        "width": width, "height": height, "scheduler": sampler,
    }  # fmt: skip
    asked = generating.request(
        prompts, seed=seed, count=count, look=look, erasures=erasures, policy=policy, strict=strict,
        strengths=strengths,
    )  # fmt: skip
    return generating.pictures(
        asked, base, report or Bars(), device=device, dtype=dtype, prediction=prediction
    )


def demo_pipeline() -> DiffusionPipeline:
    """A diffusers pipeline over the built-in checkpoint (64 px, on the CPU): something to try on."""
    from conceptzap.base import load_base

    return load_base("demo", "cpu").pipeline()


def apply(
    pipe: DiffusionPipeline,
    erasures: Asked | Iterable[Asked],
    strength: float = 1.0,
    strict: bool = False,
) -> Handle:
    """Attach erasures to a diffusers pipeline; every call of it from now on is erased or raises.

    `erasures` is a path, a value, a pair of one and its strength, or a list of these. A second call
    stacks; the handle's `remove()`, or the end of a `with` block, takes its own off again. Raises
    `FormatError`, `MismatchError` for another architecture and `RefusedError` if an edit does not
    act on this pipeline; nothing is attached then. Another checkpoint is warned of, with `strict`
    refused.

    It does not travel: `pipe.save_pretrained` writes the base, with nothing erased. Ship the file
    beside it, or write the erasure into weights with `export`.
    """
    from conceptzap.verbs import applying

    return applying.apply(pipe, erasures, strength, strict)


def applied(pipe: DiffusionPipeline) -> tuple[Handle, ...]:
    """The handles of all erasures on the pipeline's UNet, first to last."""
    from conceptzap.verbs import applying

    return applying.applied(pipe)


def remove(pipe: DiffusionPipeline) -> None:
    """Take every erasure off the pipeline's UNet, bit for bit; none there is no error."""
    from conceptzap.verbs import applying

    applying.remove(pipe)


def export(
    erasures: Asked | Iterable[Asked],
    to: str,
    output: Path | str,
    *,
    base: AnyBase = "demo", prediction: str | None = None,
    rank: int | None = None, dtype: str = "auto",
    force: bool = False,
    report: Report | None = None,
) -> Exported:  # fmt: skip
    """Write erasures, stacked, in the format `to` of the folder `exports`: "lora" or "checkpoint".

    Both hold changes of weights that stand behind no gate, whole or not at all: `RefusedError`
    lists what does not fit, and is raised for keys. A LoRA holds dense changes by the `rank`
    largest components, with a warning of the error. A checkpoint is read back and compared with
    the attached edits before it gets its name. `dtype` auto is the narrowest that loses nothing.
    Raises `UsageError` for an `output` that exists, unless `force`.
    """
    from conceptzap.verbs import exporting

    return exporting.export(
        erasures, to, output, base=base, prediction=prediction, rank=rank, dtype=dtype, force=force,
        report=report or Bars(),
    )  # fmt: skip


def evaluate(
    erasures: Asked | Iterable[Asked],
    base: AnyBase = "demo",
    *,
    suite: str = "quick",
    concepts: Sequence[str] | str = (), judges: Sequence[str] | str = (),
    seed: int = 0, steps: int | None = None, guidance: float | None = None,
    batch: int | None = None, limit: int | None = None,
    fail_under: Iterable[str] | None = None,
    device: str = "auto", dtype: str = "auto",
    prediction: str | None = None,
    strict: bool = False,
    output: Path | str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Evaluation:  # fmt: skip
    """Measure what erasures, attached together, took out of a base and what they cost the rest.

    Base and erased model draw the suite's prompts from the same seeds; the judges say what they
    see. `concepts` is what must be gone, the files' own when none is given; `limit` at most so many
    pictures of a slice; `steps`, `guidance` and `batch` are the suite's unless given. What comes
    back has `result` (scores with 95 % intervals) and, with `output`, `written`: the files of that
    folder, a page among them.

    With `fail_under`, such as `["E=95"]` or `[]`, a concept that is still drawn (E under 90 %, or
    under what is given) and a lower limit under its percentage raise `ThresholdError`; what was
    measured is its `made`. Raises `UsageError` and `ResourceError` for what the suite does not know
    before any picture is drawn, and what `generate` raises for erasures.
    """
    from conceptzap.verbs import evaluating

    return evaluating.evaluate(
        admission.listed(erasures), base, suite=suite, concepts=_listed(concepts),
        judges=_listed(judges), seed=seed, steps=steps, guidance=guidance, batch=batch, limit=limit,
        fail_under=fail_under, device=device, dtype=dtype, prediction=prediction, strict=strict,
        output=output, force=force, report=report or Bars(),
    )  # fmt: skip


def attack(
    erasures: Asked | Iterable[Asked], attack: str, base: AnyBase = "demo", **options: Any
) -> Attacked:
    """Try to bring back what erasures, attached together, took out of a base.

    `attack` names a file of the folder `attacks`, `options` are those of `verbs.attacking.attack`.
    What comes back has `before`, `asr` (after the worst of `forms`), `recoverability`, `oracle` (the
    same of a checkpoint that never knew it, if one was given), `record()`, and `written`.
    """
    from conceptzap.verbs import attacking

    listed = admission.listed(erasures)
    return attacking.attack(listed, base, attack=attack, **{"report": Bars(), **options})


def compare(results: Sequence[Path | str]) -> dict[str, Result]:
    """Results of `evaluate` by a name that tells them apart, in order: files or their folders.

    Raises `UsageError` for what is no result, and for results that are not of one experiment: the
    same base, suite, prompts and seeds, settings and judges.
    """
    from conceptzap.verbs import evaluating

    return evaluating.compare(results)


def bench(
    path: Path | str | None = None,
    *,
    methods: Sequence[str] = (),
    concepts: Sequence[str] = (),
    suites: Sequence[str] = (),
    attacks: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    preset: str | None = None,
    base: Path | str | None = None, prediction: str | None = None,
    seed: int | None = None,
    judges: Sequence[str] = (),
    steps: int | None = None, guidance: float | None = None,
    batch: int | None = None, limit: int | None = None,
    device: str | None = None, dtype: str | None = None,
    output: Path | str = "bench",
    force: bool = False,
    report: Report | None = None,
) -> Bench:  # fmt: skip
    """Every method on every concept in every suite, under one budget: settings as given, none tuned.

    `path` is a TOML file of these arguments (`settings` is its table `set`, a table a method); what
    is given beside it wins. A concept may name its anchor: "Van Gogh:painting". `steps`, `guidance`,
    `batch` and `limit` are of the pictures, as in `evaluate`. `attacks` are those of `attack`, "quick",
    on every erasure. The folder `output` gets the erasures, `bench.json`, `bench.csv` and a page. The
    same call goes on where it was stopped, also after a kill, and takes up the cells that failed; under
    `accelerate launch` each process does its share. Every cell has its `result` or its `error`.

    Raises `UsageError` for what cannot be meant, or a folder that holds another bench (with `force` its
    cells are kept where they still fit).
    """
    from conceptzap.verbs import benching

    given = {
        "methods": methods, "concepts": concepts, "suites": suites, "attacks": attacks, "set": settings,
        "preset": preset, "base": base and str(base), "prediction": prediction, "seed": seed,
        "judges": judges, "steps": steps, "guidance": guidance, "batch": batch, "limit": limit,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    lists = {key: _listed(given[key]) for key in ("methods", "concepts", "suites", "attacks", "judges")}
    return benching.bench(path, given | lists, output, force, report or Bars())


def cite(paths: Path | str | Sequence[Path | str], report: Report | None = None) -> dict[str, str]:
    """BibTeX of what made some files, by key: the papers of their methods, and conceptzap itself.

    Raises `FormatError` for what is no erasure; warns of a method that is not known here.
    """
    from conceptzap.verbs import citing

    return citing.cite(_listed(paths), report or Bars())


def lock(
    erasures: Path | str | Iterable[Path | str],
    output: Path | str = "conceptzap.lock",
    *,
    base: Path | str = "demo", prediction: str | None = None,
    attacked: Path | str | Iterable[Path | str] = (),
    fail_over: Iterable[str] = (),
    force: bool = False,
) -> Policy:  # fmt: skip
    """Write a policy that pins erasure files on a base: these files, this checkpoint, nothing less.

    `attacked`: results of `attack` on all of them together, pinned too, with no rate over `fail_over`,
    such as `["ASR=10"]`. Paths of files and of a base that is a folder or file are kept relative to the
    policy. Raises `UsageError` for an `output` that exists (unless `force`) or no files, `FormatError`
    for what is no erasure, `RefusedError` for keys, scaled and foreign erasures, rates over a limit.
    """
    from conceptzap.trust import guard

    rest = {"attacked": _listed(attacked), "fail_over": fail_over}
    return guard.lock(_listed(erasures), base, output, force=force, prediction=prediction, **rest)


def verify(path: Path | str = "conceptzap.lock", *, device: str = "auto") -> Policy:
    """The policy, once all of it holds here: version, files, the base's weights, every self-test.

    Raises `RefusedError` with every reason otherwise, `UsageError` for what is no policy.
    """
    from conceptzap.trust import guard

    return guard.verify(path, device)


def _listed(given: Any) -> tuple[Any, ...]:
    """One thing or several, as several."""
    return (given,) if isinstance(given, (str, Path, Erasure)) else tuple(given)
