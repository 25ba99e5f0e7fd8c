"""Attacks from names to a result: all is checked at once, then searched, drawn and judged."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import ThresholdError, UsageError, escape
from conceptzap.evaluation import judging, probes, verdict
from conceptzap.evaluation.probes import Subject
from conceptzap.evaluation.run import Experiment
from conceptzap.page import attack as page
from conceptzap.redteam import trial
from conceptzap.redteam.outcome import Attacked
from conceptzap.redteam.victim import Victim
from conceptzap.registry import catalog, config, family
from conceptzap.report import Report
from conceptzap.result import Probe
from conceptzap.trust import admission, attested, policy
from conceptzap.trust.admission import Asked, Loaded
from conceptzap.verbs import evaluating, launched
from conceptzap.verbs.generating import described, find_base
from conceptzap.verbs.launched import Team

FAMILY = "attacks"
PROMPTS = {"quick": 16, "paper": 64}  # probes of each concept, by budget


def attack(
    erasures: Iterable[Asked],
    base: Any,
    *,
    attack: str,
    budget: str = "quick",
    overrides: Mapping[str, Any] | None = None,
    prompts: int | None = None,
    concepts: Sequence[str] | str = (),
    forms: Sequence[str] | str = (),
    fail_over: Iterable[str] = (),
    output: Path | str | None = None,
    force: bool = False,
    oracle: Any = None,
    report: Report,
    suite: str = "quick",
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
    strict: bool = False,
    **request: Any,
) -> Attacked:
    """See `api.attack`; `request` as for `evaluating.settle`: judges, seed, steps, guidance, batch.

    `budget` is "quick" or "paper", `overrides` are settings of the attack; each concept, the files'
    own when none is given, is asked for in `prompts` prompts. Of the attack's `forms` all are tried that
    differ, or those that are named; their worst is no ASR, and has no limit then. `oracle`: a checkpoint
    that never knew them, attacked in the same way. With `output`, what was found is written to that folder.
    A rate over its percentage in `fail_over`, such as `["ASR=10"]`, raises `ThresholdError`, whose `made` is
    what was measured.
    """
    # 1. all that can be known to be wrong before the base is loaded
    if prompts is not None and prompts < 1:
        raise UsageError(f"--prompts {prompts} is out of range", "use 1 or more")
    chosen = settled(attack, budget, overrides or {}, prompts, forms)
    limits = parse(fail_over)
    if chosen.forms and set(limits) - {"before"}:
        raise UsageError("--fail-over is of all forms, and --form leaves some out", "use one of the two")
    loaded = admission.load_all(erasures)
    team = Team(device)
    target = page.prepare(Path(output), force) if output is not None and team.leads else None
    # 2. and before anything is drawn
    here = find_base(base, team.device, dtype, prediction)
    report.phase(described(here))
    check_room(chosen, here)
    concepts = (concepts,) if isinstance(concepts, str) else concepts
    named = concepts or [concept for one in loaded for concept in one.erasure.header.concepts]
    experiment = evaluating.settle(here, suite, list(dict.fromkeys(named)), **request)
    if not experiment.targets:
        raise UsageError(f"the suite {experiment.suite.name} asks for no concept", "use another --suite")
    admission.admit_all(here, [one.erasure for one in loaded], strict, report)
    never = None if oracle is None else find_base(oracle, team.device, dtype, prediction)
    # 3. search, draw, look
    with launched.drawing(team):
        done = carry_out(chosen, here, loaded, experiment, report, never)
    if target is not None:
        done = replace(done, written=page.write(done, target, force))
    enforce(done, limits if team.leads else {})
    return done


@dataclass(frozen=True)
class Chosen:
    """An attack with its settings: `member` is its file, each concept is asked for in `n` prompts."""

    name: str
    member: Any
    budget: str
    config: Any
    n: int
    forms: tuple[str, ...] = ()


def settled(
    name: str,
    budget: str,
    overrides: Mapping[str, Any],
    prompts: int | None = None,
    forms: Sequence[str] | str = (),
) -> Chosen:
    """The attack called `name` with the settings of the budget, and what is set over them."""
    if budget not in PROMPTS:
        raise UsageError(f"no budget is called {budget!r}", family.suggest(budget, PROMPTS))
    known = catalog.attack_names()
    if name not in known:
        raise UsageError(f"no attack is called {name!r}", family.suggest(name, known))
    member = family.load(FAMILY, known[name])
    forms = tuple(dict.fromkeys((forms,) if isinstance(forms, str) else forms))
    every = getattr(member, "FORMS", ())
    for form in forms:
        if form not in every:
            hint = family.suggest(form, every) if every else "it has none: leave --form out"
            raise UsageError(f"{name} has no form {form!r}", hint)
    forms = () if set(forms) == set(every) else forms
    paper = member.PAPER_SETTINGS if budget == "paper" else {}
    cfg = config.resolve(member.Config, paper, overrides)
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if type(value) in (int, float) and (value < 0 or (type(value) is int and value < 1)):
            raise UsageError(f"{field.name}={value} is out of range", "use a number above 0")
        if "most" in field.metadata and value > field.metadata["most"]:
            raise UsageError(f"{field.name}={value} is out of range", "use a share from 0 to 1")
    return Chosen(name, member, budget, cfg, prompts or PROMPTS[budget], forms)


def check_room(chosen: Chosen, base: Base) -> None:
    """Raise `UsageError` where an attack is to search for more tokens than the base's texts have room for."""
    for field in dataclasses.fields(chosen.config):
        value = getattr(chosen.config, field.name)
        if "tokens" in field.metadata and value > base.max_tokens:
            message = f"{field.name}={value} is more than texts of {base.id} have room for"
            raise UsageError(message, f"use {base.max_tokens} or fewer")


def carry_out(
    chosen: Chosen,
    here: Base,
    loaded: Sequence[Loaded],
    experiment: Experiment,
    report: Report,
    oracle: Base | None = None,
) -> Attacked:
    """Attack what is loaded, and an oracle in the same way, one concept after the other."""
    victims = _victims(here, [edit for one in loaded for edit in one.edits], experiment, chosen)
    others = [] if oracle is None else [victim.oracle(oracle) for victim in victims]

    def tried(those: Sequence[Victim]) -> Attacked:
        began = time.monotonic()
        attempts = ((one, chosen.member.attack(one, chosen.config, report)) for one in those)
        trials = tuple(trial.run(one, experiment.judges, each, report) for one, each in attempts)
        seconds = time.monotonic() - began + sum(sum(one.spent.values()) for one in those)
        return Attacked(trials, _about(chosen, experiment, loaded, those), seconds)

    done = replace(tried(victims), oracle=tried(others) if others else None)
    found = {form.name.partition(",")[0] for form in done.forms}
    if same := [form for form in chosen.forms if form not in found]:
        report.note(f"{', '.join(same)}: no other here than {', '.join(sorted(found))}")
    return done


def questions(experiment: Experiment, subject: Subject, n: int) -> tuple[Probe, ...]:
    """n probes that ask for a concept by name, half of them in wordings that no erasure trains on."""
    counts = {name: count for name, count in (("held-out", (n + 1) // 2), ("seen", n // 2)) if count}
    suite = replace(experiment.suite, erase=counts, keep={}, repeats=1)
    return probes.expand(suite, experiment.world, [subject], seed=experiment.seed)


def parse(pairs: Iterable[str]) -> dict[str, float]:
    """`["ASR=10"]` -> `{"ASR": 0.1}`; `UsageError` for an unknown rate or no percentage."""
    return verdict.percentages("--fail-over", pairs, tuple(attested.RATES), "rate")


def enforce(done: Attacked, limits: Mapping[str, float]) -> None:
    """Raise `ThresholdError` where a rate is over its limit."""
    rates = {"ASR": done.asr, "before": done.before, "newly": done.worst.newly}
    over = [
        f"{name} is {rates[name].value:.1%} of {rates[name].n}, over {most:.1%}"
        for name, most in limits.items() if rates[name].value > most
    ]  # fmt: skip
    if over:
        written = done.written.get("result")
        error = ThresholdError("; ".join(over), f"see {escape(written)}" if written else "")
        error.made = done
        raise error


def _victims(here: Base, edits: Sequence[Edit], experiment: Experiment, chosen: Chosen) -> list[Victim]:
    """One for each concept, all with the same base and edits."""
    n, rest = chosen.n, {"world": experiment.world, "settings": experiment.settings, "seed": experiment.seed}
    rest["only"] = chosen.forms
    first, *others = experiment.targets
    one = Victim.of(here, edits, first, probes=questions(experiment, first, n), **rest)
    return [one, *(replace(one, target=t, probes=questions(experiment, t, n), spent={}) for t in others)]


def _about(
    chosen: Chosen, experiment: Experiment, loaded: Sequence[Loaded], victims: Sequence[Victim]
) -> dict[str, Any]:
    """What was attacked and how."""
    files = [
        {
            "name": os.path.basename(one.path) if one.path else one.erasure.header.title,
            "digest": one.erasure.digest,
            "strength": one.strength,
        }
        for one in loaded
    ]
    # the base as files know it: what text encoders were made of is the erasure's
    one = victims[0]
    base, digest = (one.base, one.digest) if one.never else (one.knows, one.taught or one.digest)
    return {
        "attack": chosen.name,
        "control": getattr(chosen.member, "CONTROL", False),
        "budget": chosen.budget,
        "config": dataclasses.asdict(chosen.config),
        "only": list(chosen.forms),
        "subject": {
            "files": files, "concepts": [one.target.name for one in victims],
            "words": {one.target.name: list(one.words) for one in victims},
        },
        "base": {
            "id": base.id, "family": base.family, "digest": digest,
            "fingerprint": dict(base.fingerprint(policy.EVERYTHING)),
        },
        "suite": experiment.suite.name,
        "settings": experiment.settings.record(),
        "seed": experiment.seed,
        "judges": judging.record(experiment.judges),
        "probes": probes.digest([probe for one in victims for probe in one.probes]),
    }
