"""UA, IRA, CRA: unlearning, in-domain and cross-domain accuracy (UnlearnCanvas, arXiv 2402.11846)."""

from __future__ import annotations

from collections.abc import Iterator

from conceptzap.evaluation import estimates
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score


def score(comparison: Comparison) -> Iterator[Score]:
    """UA: 1 - accuracy on the erased concepts; IRA: accuracy on other concepts of their kinds; CRA:
    accuracy on every other kind. Not normalised by the base, as the benchmark prints them.
    """
    if concepts := estimates.hits(comparison):
        erased = [[1 - prompt for prompt in prompts] for prompts in concepts]
        yield estimates.leg("UA", erased, 1, "higher", "")
    kinds = {kind for kind, _ in comparison.targets}
    inside = [pair for pair in comparison.kept_labels if pair[0] in kinds]
    across = [pair for pair in comparison.kept_labels if pair[0] not in kinds]
    for metric, labels in (("IRA", inside), ("CRA", across)):
        if labels:
            yield estimates.leg(metric, estimates.kept(comparison, labels), 1, "higher", "")
