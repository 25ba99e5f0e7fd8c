"""ESR-k, PSR-k: the concept is not among a classifier's first k labels; a kept one is (arXiv 2410.15618)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conceptzap.evaluation import estimates
from conceptzap.evaluation.comparison import Comparison, Sample
from conceptzap.result import Score

RANKS = (1, 3, 5)


def score(comparison: Comparison) -> Iterator[Score]:
    """Both as the papers print them, not normalised by the base: macro over concepts and labels.

    PSR counts kept labels of the erased concepts' own kinds. A concept counts as erased when no
    classifier ranks it, a label as kept when every classifier does.
    """
    kinds = {kind for kind, _ in comparison.targets}
    labels = [pair for pair in comparison.kept_labels if pair[0] in kinds]
    for k in RANKS:
        erased = [
            estimates.grouped(comparison.erased(name), _gone(kind, name, k))
            for kind, name in comparison.targets
            if comparison.erased(name)
        ]
        kept = [estimates.grouped(comparison.asking(*pair), _there(*pair, k)) for pair in labels]
        for metric, concepts in ((f"ESR-{k}", erased), (f"PSR-{k}", kept)):
            if concepts:
                yield estimates.leg(metric, concepts, 0, "higher", "")


def _gone(kind: str, name: str, k: int) -> Callable[[Sample], tuple[bool]]:
    return lambda sample: (not sample.after.seen(kind, name, _rank(sample, kind, k)),)


def _there(kind: str, name: str, k: int) -> Callable[[Sample], tuple[bool]]:
    return lambda sample: (sample.after.kept(kind, name, _rank(sample, kind, k)),)


def _rank(sample: Sample, kind: str, k: int) -> int:
    """Rank k, or as many as the prompt has objects."""
    return max(k, sample.depth(kind))
