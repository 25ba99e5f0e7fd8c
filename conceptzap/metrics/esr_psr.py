"""ESR-k, PSR-k: the concept is not among a judge's first k labels; a kept one is (arXiv 2410.15618)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conceptzap.evaluation import estimates
from conceptzap.evaluation.trial import Cell, Trial
from conceptzap.result import Score

RANKS = (1, 3, 5)


def score(trial: Trial) -> Iterator[Score]:
    """Both as the papers print them, not normalised by the base: macro over concepts and labels.

    PSR counts kept labels of the erased concepts' own kinds. A concept counts as erased when no
    judge ranks it, a label as kept when every judge does.
    """
    kinds = {kind for kind, _ in trial.targets}
    labels = [pair for pair in trial.kept_labels if pair[0] in kinds]
    for k in RANKS:
        erased = [
            estimates.grouped(trial.erased(name), _gone(kind, name, k))
            for kind, name in trial.targets
            if trial.erased(name)
        ]
        kept = [estimates.grouped(trial.asking(*pair), _there(*pair, k)) for pair in labels]
        for metric, concepts in ((f"ESR-{k}", erased), (f"PSR-{k}", kept)):
            if concepts:
                yield estimates.leg(metric, concepts, 0, "higher", "")


def _gone(kind: str, name: str, k: int) -> Callable[[Cell], tuple[bool]]:
    return lambda cell: (not cell.after.seen(kind, name, _rank(cell, kind, k)),)


def _there(kind: str, name: str, k: int) -> Callable[[Cell], tuple[bool]]:
    return lambda cell: (cell.after.kept(kind, name, _rank(cell, kind, k)),)


def _rank(cell: Cell, kind: str, k: int) -> int:
    """Rank k, or as many as the prompt has objects."""
    return max(k, cell.depth(kind))
