"""The verbs that measure: what is gone, what it cost the rest, what an attacker gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap.api.files import listed
from conceptzap.report import Report, begun
from conceptzap.trust import admission
from conceptzap.trust.admission import Asked

if TYPE_CHECKING:
    from conceptzap.evaluation.matrix import Bench
    from conceptzap.evaluation.run import Evaluation
    from conceptzap.redteam.outcome import Attacked
    from conceptzap.result import Result
    from conceptzap.verbs.generating import AnyBase


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

    Base and erased model draw the suite's prompts from the same seeds; the classifiers say what they
    see. `concepts` is what must be gone, the files' own when none is given; `limit` at most so many
    pictures of a slice; `steps`, `guidance` and `batch` are the suite's unless given. What comes
    back has `result` (scores with 95 % intervals) and, with `output`, `written`: the files of that
    folder, a page among them. Under `accelerate launch` each process draws its share, into one cache.

    With `fail_under`, such as `["E=95"]` or `[]`, a concept that is still drawn (E under 90 %, or
    under what is given) and a lower limit under its percentage raise `ThresholdError`; what was
    measured is its `made`. Raises `UsageError` and `ResourceError` for what the suite does not know
    before any picture is drawn, and what `generate` raises for erasures.
    """
    report = begun(report)
    from conceptzap.verbs import evaluating

    return evaluating.evaluate(
        admission.listed(erasures), base, suite=suite, concepts=listed(concepts),
        judges=listed(judges), seed=seed, steps=steps, guidance=guidance, batch=batch, limit=limit,
        fail_under=fail_under, device=device, dtype=dtype, prediction=prediction, strict=strict,
        output=output, force=force, report=report,
    )  # fmt: skip


def attack(
    erasures: Asked | Iterable[Asked],
    attack: str,
    base: AnyBase = "demo",
    *,
    budget: str = "quick",
    overrides: Mapping[str, Any] | None = None,
    prompts: int | None = None,
    suite: str = "quick",
    concepts: Sequence[str] | str = (), judges: Sequence[str] | str = (),
    seed: int = 0, steps: int | None = None, guidance: float | None = None,
    batch: int | None = None,
    forms: Sequence[str] | str = (),
    fail_over: Iterable[str] = (),
    oracle: AnyBase | None = None,
    device: str = "auto", dtype: str = "auto",
    prediction: str | None = None,
    strict: bool = False,
    output: Path | str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Attacked:  # fmt: skip
    """Try to bring back what erasures, attached together, took out of a base.

    `attack` names a file of the folder `attacks`, `overrides` are its settings; each concept, the files'
    own when none is given, is asked for in `prompts` prompts (16 with the `budget` "quick", 64 with
    "paper"). Naming `forms` leaves out the attack's others. `oracle`: a checkpoint that never knew it,
    attacked in the same way. With `output`, what was found is written to that folder. What comes back has
    `before`, `asr` (after each concept's worst of `forms`), `recoverability`, `called` (what else was seen),
    `oracle`, `record()` and `written`.

    A rate over its percentage in `fail_over`, such as `["ASR=10"]`, raises `ThresholdError`, whose `made`
    is what was measured; otherwise it raises what `evaluate` does.
    """
    report = begun(report)
    from conceptzap.verbs import attacking

    return attacking.attack(
        admission.listed(erasures), base, attack=attack, budget=budget, overrides=overrides,
        prompts=prompts, suite=suite, concepts=listed(concepts), judges=listed(judges), seed=seed,
        steps=steps, guidance=guidance, batch=batch, forms=listed(forms), fail_over=fail_over, oracle=oracle,
        device=device, dtype=dtype, prediction=prediction, strict=strict, output=output, force=force,
        report=report,
    )  # fmt: skip


def compare(results: Sequence[Path | str]) -> dict[str, Result]:
    """Results of `evaluate` by a name that tells them apart, in order: files or their folders.

    Raises `UsageError` for what is no result, and for results that are not of one experiment: the
    same base, suite, prompts and seeds, settings and classifiers.
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
    report = begun(report)
    from conceptzap.verbs import benching

    given = {
        "methods": methods, "concepts": concepts, "suites": suites, "attacks": attacks, "set": settings,
        "preset": preset, "base": base and str(base), "prediction": prediction, "seed": seed,
        "judges": judges, "steps": steps, "guidance": guidance, "batch": batch, "limit": limit,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    lists = {key: listed(given[key]) for key in ("methods", "concepts", "suites", "attacks", "judges")}
    return benching.bench(path, given | lists, output, force, report)
