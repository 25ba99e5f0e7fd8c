"""identical: unrelated pictures that are bit for bit the base's, drawn one by one."""

from __future__ import annotations

from collections.abc import Iterator

from conceptzap.evaluation import intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score


def score(comparison: Comparison) -> Iterator[Score]:
    """A share with Wilson's interval; 1 where a closed gate means that the edit is absent."""
    if comparison.identical:
        yield intervals.rate("identical", comparison.identical)
