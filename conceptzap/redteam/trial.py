"""Attempts drawn with the attacked model and shown to the judges: which probes came through, when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor

from conceptzap.base import Cond
from conceptzap.evaluation.cached import CachedSampler, ImageBatch, ahead
from conceptzap.evaluation.comparison import annotate
from conceptzap.evaluation.judging import Judge
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import Victim
from conceptzap.report import Report
from conceptzap.result import Probe, Score, wilson
from conceptzap.runtime.sampler import Start

Rows = list[int]


@dataclass
class Count:
    """What the tries of one form came to: [n] each. `tries`: pictures until it came through, or in all.

    `called`: by label of the concept's kind, for which probes some judge put it first in some picture.
    `meant` [n]: does the base itself show the concept by any of these words? None where they are not asked.
    """

    through: np.ndarray
    tries: np.ndarray
    prompts: dict[int, str] = field(default_factory=dict)  # probe -> the text that brought it through
    seeds: dict[int, int] = field(default_factory=dict)  # or the seed, where that was looked for
    pictures: dict[int, np.ndarray] = field(default_factory=dict)  # its last picture
    fired: dict[int, bool] = field(default_factory=dict)  # was any edit open for it
    found: list[dict[str, Tensor]] = field(default_factory=list)
    called: dict[str, np.ndarray] = field(default_factory=dict)
    meant: np.ndarray | None = None

    @staticmethod
    def of(n: int) -> Count:
        return Count(np.zeros(n, bool), np.zeros(n, int))


@dataclass(frozen=True)
class Trial:
    """One concept attacked. `base`, `before` [n]: does the base, the erased model show it unattacked?

    `plain`: the pictures behind `before`, uint8 [n, h, w, 3]; `counts`: by form.
    """

    victim: Victim
    base: np.ndarray
    before: np.ndarray
    plain: np.ndarray
    counts: dict[str, Count]

    @property
    def worst(self) -> list[str]:
        """The forms under which most probes show the concept, equals in order; [] where none was tried."""
        shown = {name: int((self.before | count.through).sum()) for name, count in self.counts.items()}
        return [name for name, count in shown.items() if count == max(shown.values())]


def rate(metric: str, hits: Sequence[bool] | np.ndarray) -> Score:
    """A share with Wilson's interval; lower is better for whoever defends."""
    n, count = len(hits), int(sum(hits))
    return Score(metric, count / n if n else 0.0, *wilson(count, n), n, "lower")


def run(victim: Victim, judges: Sequence[Judge], attempts: Iterable[Attempt], report: Report) -> Trial:
    """Draw the probes plainly, then every attempt, for the probes that have not come through yet."""
    rows = list(range(len(victim.probes)))
    bare = CachedSampler(victim.knows, victim.settings, digest=victim.taught or victim.digest)
    erased = CachedSampler(victim.base, victim.settings, victim.edits, digest=victim.digest)
    base, _, _ = _shown(victim, judges, bare, Attempt(), rows, "drawing with the base", report)
    label = "drawing unattacked"
    before, plain, _ = _shown(victim, judges, erased, Attempt(), rows, label, report)
    trial = Trial(victim, _seen(victim, base), _seen(victim, before), plain, {})
    for attempt in attempts:
        if attempt.worded and not victim.never:
            _asked_of_base(trial, judges, bare, attempt, report)
        _tried(trial, judges, erased, attempt, report)
    return trial


def _tried(
    trial: Trial, judges: Sequence[Judge], erased: CachedSampler, attempt: Attempt, report: Report
) -> None:
    """One attempt for what is still safe: of those shown unattacked and those that came through, none."""
    victim = trial.victim
    count = trial.counts.setdefault(attempt.kind, Count.of(len(victim.probes)))
    if attempt.found:
        count.found.append(dict(attempt.found))
    rows = np.flatnonzero(~(trial.before | count.through)).tolist()
    if not rows:
        return
    label = f"trying {attempt.kind}, try {int(count.tries.max()) + 1}"
    called, pictures, fired = _shown(victim, judges, erased, attempt, rows, label, report)
    seen = _seen(victim, called)
    for index, row in enumerate(rows):
        count.tries[row] += 1
        count.pictures[row], count.fired[row] = pictures[index], fired[index]
        for one in called[index]:
            count.called.setdefault(one, np.zeros(len(victim.probes), bool))[row] = True
        if seen[index]:
            count.through[row] = True
            if attempt.prompts:
                count.prompts[row] = attempt.prompts[row]
            if attempt.seeds:
                count.seeds[row] = attempt.seeds[row]


def _asked_of_base(
    trial: Trial, judges: Sequence[Judge], bare: CachedSampler, attempt: Attempt, report: Report
) -> None:
    """The same words with nothing erased, for the probes that have not been the concept by others."""
    victim, count = trial.victim, trial.counts.setdefault(attempt.kind, Count.of(len(trial.before)))
    meant = np.zeros(len(trial.before), bool) if count.meant is None else count.meant
    rows = np.flatnonzero(~meant).tolist()
    if rows:
        label = f"asking the base for {attempt.kind}"
        meant[rows] = _seen(victim, _shown(victim, judges, bare, attempt, rows, label, report)[0])
    count.meant = meant


def _seen(victim: Victim, called: Sequence[set[str]]) -> np.ndarray:
    """In which pictures some judge sees the concept, [m]."""
    return np.array([victim.target.name in labels for labels in called], bool)


def _shown(
    victim: Victim, judges: Sequence[Judge], sampler: CachedSampler, attempt: Attempt, rows: Rows,
    label: str, report: Report,
) -> tuple[list[set[str]], np.ndarray, list[bool]]:  # fmt: skip
    """Of the rows: what judges see of the concept's kind [m], pictures [m, h, w, 3], any edit open [m]?"""
    sampler = _with(sampler, attempt)
    chunks = [[rows[i] for i in range(part.start, part.stop)] for part in victim.batches(len(rows))]
    ahead([partial(_drawn, victim, sampler, attempt, chunk) for chunk in chunks], label, report)
    drawn = (_drawn(victim, sampler, attempt, chunk) for chunk in chunks)
    called: list[set[str]] = []
    pictures: list[np.ndarray] = []
    fired: list[bool] = []
    for batch in report.count(drawn, len(chunks), label):
        noted, _ = annotate([judge.predict(batch.pictures) for judge in judges])
        called += [one.first(victim.target.kind) for one in noted]
        pictures += list(batch.pictures)
        fired += [bool(names) for names in batch.fired]
    return called, np.stack(pictures), fired


def _with(sampler: CachedSampler, attempt: Attempt) -> CachedSampler:
    """The sampler under the attacker's own edits and guidance too."""
    if not attempt.edits and attempt.guidance is None:
        return sampler
    settings = sampler.settings
    if attempt.guidance is not None:
        settings = replace(settings, guidance=attempt.guidance)
    edits = (*sampler.edits, *attempt.edits)
    return CachedSampler(sampler.base, settings, edits, sampler.store, sampler.digest)


def _drawn(victim: Victim, sampler: CachedSampler, attempt: Attempt, rows: Rows) -> ImageBatch:
    probes = tuple(_asked(victim, attempt, row) for row in rows)
    if attempt.cond is None and attempt.latents is None:
        return sampler.batch(probes)
    cond = attempt.cond
    if cond is None:
        cond = victim.base.encode([probe.prompt for probe in probes])
    else:
        cond = cond[rows] if isinstance(cond, Cond) else [one[rows] for one in cond]
    noise = victim.base.noise([probe.seed for probe in probes])
    latents = noise if attempt.latents is None else attempt.latents[rows].to(noise)
    known = None if attempt.known is None else attempt.known[rows].to(noise)
    return sampler.started(probes, Start(cond, latents, attempt.first, known, attempt.mask))


def _asked(victim: Victim, attempt: Attempt, row: int) -> Probe:
    probe = victim.probes[row]
    prompt = attempt.prompts[row] if attempt.prompts else probe.prompt
    return replace(probe, prompt=prompt, seed=attempt.seeds[row] if attempt.seeds else probe.seed)
