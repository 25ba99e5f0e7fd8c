"""The legs a result stands on: what voids it, what fails it, and thresholds a user sets. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from conceptzap.errors import ThresholdError, UsageError
from conceptzap.registry.family import suggest
from conceptzap.result import Result, Score

# metric, slice, smallest value that stands, what it means when it is less
FLOORS = (
    ("validity", "", 0.98, "the pictures are broken, so that nothing in them means nothing"),
    ("diversity", "keep", 0.8, "the pictures resemble one another far more than the base's"),
    ("diversity", "erase", 0.3, "the concept's pictures are nearly all the same"),
    ("E", "", 0.9, "the concept is still drawn"),
    ("P", "", 0.9, "what was to stay is damaged"),
)
# a kept picture as far from the base's as another seed's is not the base's picture any more
DRIFTED = 0.9
# sealed prompts are no harder than the open ones, so a gap this wide is not chance
SEALED_GAP = 0.25
SEALED = "erase/sealed"
HIGHER = ("E", "P", "H", "ESR-1", "ESR-3", "ESR-5", "PSR-1", "PSR-3", "PSR-5", "UA", "IRA", "CRA",
          "validity", "diversity", "identical")


def legs(scores: Iterable[Score]) -> tuple[dict[str, str], ...]:
    """Every leg that fails, as `leg` and `why`. Any but E and P voids the result as a whole."""
    found = {(score.metric, score.slice): score for score in scores}
    failed = [
        _leg(metric, slice, f"{found[metric, slice].value:.0%} < {least:.0%}: {why}")
        for metric, slice, least, why in FLOORS
        if (metric, slice) in found and found[metric, slice].value < least
    ]
    drift = found.get(("drift", ""))
    if drift and drift.value >= DRIFTED:
        why = f"{drift.value:.2f} >= {DRIFTED}: kept pictures are no longer the base's"
        failed.append(_leg("drift", "", why))
    sealed, overall = found.get(("E", SEALED)), _open(found)
    if sealed and overall is not None and overall - sealed.value > SEALED_GAP:
        why = f"E {sealed.value:.0%} against {overall:.0%} on open prompts: those were memorised"
        failed.append(_leg("sealed", "", why))
    return tuple(failed)


def _leg(metric: str, slice: str, why: str) -> dict[str, str]:
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


def parse(pairs: Sequence[str]) -> dict[str, float]:
    """`["E=95"]` -> `{"E": 0.95}`; `UsageError` for an unknown metric or no percentage."""
    wanted = {}
    for pair in pairs:
        metric, _, text = pair.partition("=")
        if metric not in HIGHER:
            raise UsageError(f"--fail-under {pair!r}: no such metric", suggest(metric, HIGHER))
        try:
            percent = float(text)
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            raise UsageError(f"--fail-under {pair!r} is no percentage", "for example E=95")
        wanted[metric] = percent / 100
    return wanted


def enforce(result: Result, thresholds: Mapping[str, float], hint: str = "") -> None:
    """Raise `ThresholdError` unless the lower interval limit of each metric reaches its threshold.

    Every leg that voids the result is missed as well.
    """
    if not thresholds:
        return
    void = [leg["leg"] for leg in result.failed if leg["leg"] not in ("E", "P")]
    missed = [f"{name} voids the result" for name in void]
    for metric, least in thresholds.items():
        score = result.score(metric, "keep" if metric == "diversity" else "")
        if score is None:
            missed.append(f"{metric} was not measured")
        elif score.low < least:
            missed.append(f"{metric} is {score.value:.1%}, at least {score.low:.1%}, under {least:.1%}")
    if missed:
        raise ThresholdError("; ".join(missed), hint)
