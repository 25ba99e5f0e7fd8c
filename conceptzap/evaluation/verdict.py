"""What a result comes to: the checks it has to stand, one sentence, and thresholds a user sets. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conceptzap.errors import ThresholdError, UsageError
from conceptzap.registry.family import suggest
from conceptzap.result import Probe, Result, Score, wilson

# metric, slice, smallest value that stands, what it means when it is less
FLOORS = (
    ("validity", "", 0.98, "the pictures are broken, so that nothing in them means nothing"),
    ("diversity", "keep", 0.8, "the pictures resemble one another far more than the original's"),
    ("diversity", "erase", 0.3, "the concept's pictures are nearly all the same"),
    ("E", "", 0.9, "the concept is still drawn"),
    ("P", "", 0.9, "what was to stay is damaged"),
)
# a kept picture as far from the base's as another seed's is not the base's picture any more
DRIFTED = 0.9
# sealed prompts are no harder than the open ones, so a gap this wide is not chance
SEALED_GAP = 0.25
SEALED = "erase/sealed"
LEAKS = 0.2  # a file whose own figures show the concept in more of its pictures is no erasure
DRAWN = 0.5  # a base that shows a concept in fewer of its pictures does not know it
LARGE_SUITE = "standard"
HIGHER = ("E", "P", "H", "ESR-1", "ESR-3", "ESR-5", "PSR-1", "PSR-3", "PSR-5", "UA", "IRA", "CRA",
          "validity", "diversity", "identical")
ERASED, NOT_ERASED, VOID, UNKNOWN = "erased", "not erased", "no sound result", "nothing to tell by"


def failures(scores: Iterable[Score]) -> tuple[dict[str, str], ...]:
    """Every check that fails, as `leg` and `why`. Any but E and P voids the result as a whole."""
    found = {(score.metric, score.slice): score for score in scores}
    failed = [
        _failure(metric, slice, f"{found[metric, slice].value:.0%} < {least:.0%}: {why}")
        for metric, slice, least, why in FLOORS
        if (metric, slice) in found and found[metric, slice].value < least
    ]
    drift = found.get(("drift", ""))
    if drift and drift.value >= DRIFTED:
        why = f"{drift.value:.2f} >= {DRIFTED}: kept pictures are no longer the original's"
        failed.append(_failure("drift", "", why))
    sealed, overall = found.get(("E", SEALED)), _open(found)
    if sealed and overall is not None and overall - sealed.value > SEALED_GAP:
        why = f"E {sealed.value:.0%} against {overall:.0%} on open prompts: those were memorised"
        failed.append(_failure("hidden prompts", "", why))
    return tuple(failed)


def _failure(metric: str, slice: str, why: str) -> dict[str, str]:
    return {"leg": f"{metric} [{slice}]" if slice else metric, "why": why}


def _open(found: Mapping[tuple[str, str], Score]) -> float | None:
    """E over all slices but the sealed one, weighted by their pictures."""
    slices = [
        score
        for (metric, slice), score in found.items()
        if metric == "E" and slice.startswith("erase/") and slice != SEALED
    ]
    total = sum(score.n for score in slices)
    return sum(score.value * score.n for score in slices) / total if total else None


# in words


def status(result: Result) -> str:
    """One of `ERASED`, `NOT_ERASED`, `VOID`, `UNKNOWN`; "" where nothing was asked to be gone.

    `UNKNOWN`: the base itself hardly draws the concept. `VOID`: a check other than E and P fails.
    """
    drawn, asked = result.counts.get("drawn", (0, 0))
    if not asked:
        return VOID if _voids(result) else ""
    if drawn < DRAWN * asked:
        return UNKNOWN
    if any(failed["leg"] == "E" for failed in result.failed):
        return NOT_ERASED
    return VOID if _voids(result) else ERASED


def _voids(result: Result) -> list[str]:
    return [failed["leg"] for failed in result.failed if failed["leg"] not in ("E", "P")]


def concepts(result: Result) -> str:
    """What was asked to be gone, else what the files erase, in words."""
    files = (concept for file in result.subject["files"] for concept in file["concepts"])
    names = list(dict.fromkeys(result.subject["concepts"] or files)) or ["nothing"]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def title(result: Result) -> str:
    """`Van Gogh: not erased`: a heading that does not promise what the figures deny."""
    said = status(result) or "what is kept"
    damaged = any(failed["leg"] == "P" for failed in result.failed)
    more = ", and the rest is damaged" if damaged and said in (ERASED, NOT_ERASED) else ""
    name = concepts(result)
    return f"{name[:1].upper()}{name[1:]}: {said}{more}"


def sentence(result: Result) -> str:
    """`Van Gogh is gone from 260 of 260 pictures; 540 of 540 others kept`, in plain counts."""
    gone, asked = result.counts.get("gone", (0, 0))
    kept, right = result.counts.get("kept", (0, 0))
    name = concepts(result)
    verb = "are" if " and " in name else "is"
    parts = []
    if status(result) == UNKNOWN:
        drawn = result.counts["drawn"][0]
        parts = [f"the base itself shows {name} in only {drawn} of {asked} pictures that ask for it"]
    elif asked:
        parts = [f"{name} {verb} gone from {gone} of {asked} pictures"]
    if right:
        parts.append(f"{kept} of {right} others kept")
    return "; ".join(parts) or "no classifier recognised anything in the original's pictures"


# thresholds


def parse(pairs: Iterable[str]) -> dict[str, float]:
    """`["E=95"]` -> `{"E": 0.95}`; `UsageError` for an unknown metric or no percentage."""
    return percentages("--fail-under", pairs, HIGHER, "metric")


def percentages(
    option: str, pairs: Iterable[str], known: Sequence[str], what: str
) -> dict[str, float]:
    """The fractions that an option's texts `NAME=percentage` ask for, by name.

    `what` is what a name stands for. Raises `UsageError` for a name not in `known` or no percentage.
    """
    wanted = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known:
            raise UsageError(f"{option} {pair!r}: no such {what}", suggest(name, known))
        try:
            percent = float(text)
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            example = f"{known[0]}=50"
            raise UsageError(f"{option} {pair!r} is no percentage", f"use 0 to 100, for example {example}")
        wanted[name] = percent / 100
    return wanted


def too_few(metric: str, least: float, n: int) -> str:
    """Why n pictures without one exception could not reach a threshold; "" where they could.

    The lower limit of a perfect share is Wilson's.
    """
    if wilson(n, n)[0] >= least:
        return ""
    return f"{n} pictures cannot show {metric} {100 * least:.4g} %"


def enforce(result: Result, thresholds: Mapping[str, float], hint: str = "") -> None:
    """Raise `ThresholdError` for a concept that is still drawn, or a threshold that is not met.

    A threshold is met when the lower interval limit reaches it. One for E takes the place of the
    check that the concept is gone. With any threshold, what voids the result is missed as well.
    """
    missed = [f"{name} voids the result" for name in (_voids(result) if thresholds else ())]
    if "E" not in thresholds and status(result) == NOT_ERASED:
        missed.append(f"not erased: {sentence(result)}")
    for metric, least in thresholds.items():
        score = result.score(metric, "keep" if metric == "diversity" else "")
        if score is None:
            missed.append(f"{metric} was not measured")
        elif score.low < least:
            few = score.value >= least and too_few(metric, least, score.n)
            told = f"{metric} is {score.value:.1%}, at least {score.low:.1%}, under {least:.1%}"
            missed.append(f"{few}; use --suite {LARGE_SUITE}" if few else told)
    if missed:
        raise ThresholdError("; ".join(missed), hint)


def check_gone(made: Any, scores: Mapping[str, Score], where: str, hint: str) -> None:
    """Raise `ThresholdError`, with what was `made`, where its own closing figures still see the concept."""
    leak = scores.get("leak")
    if leak and leak.value > LEAKS:
        error = ThresholdError(f"not erased: {leak.value:.0%} of {leak.n} pictures {where}", hint)
        error.made = made
        raise error


def shortfalls(thresholds: Mapping[str, float], n: Mapping[str, int]) -> list[str]:
    """Thresholds that no erasure can meet with so many pictures of each metric, one line each."""
    lines = (too_few(metric, least, n[metric]) for metric, least in thresholds.items() if metric in n)
    return [f"{line}; use --suite {LARGE_SUITE}" for line in lines if line]


def expected(probes: Sequence[Probe]) -> dict[str, int]:
    """How many pictures the scores of some probes will rest on."""
    erasing = sum(probe.erases for probe in probes)
    return {"E": erasing, "P": sum(len(probe.expect) for probe in probes if not probe.erases)}
