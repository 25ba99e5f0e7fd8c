"""gate_false_open, gate_false_shut: gates open on prompts to keep, shut on prompts of the concept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conceptzap.evaluation import intervals
from conceptzap.evaluation.comparison import Comparison
from conceptzap.result import Score

Opened = dict[str, tuple[bool, ...]]  # slice -> for each picture, did a gate open


def score(comparison: Comparison) -> Iterator[Score]:
    """Over pictures, in all and by slice; nothing where the erasure has no gate."""
    yield from _rates("gate_false_open", _slices(comparison, "keep/"), lambda opened: opened)
    yield from _rates("gate_false_shut", _slices(comparison, "erase/"), lambda opened: not opened)


def _slices(comparison: Comparison, prefix: str) -> Opened:
    return {name: rows for name, rows in comparison.gates.items() if name.startswith(prefix)}


def _rates(metric: str, slices: Opened, wrong: Callable[[bool], bool]) -> Iterator[Score]:
    everything = [wrong(opened) for rows in slices.values() for opened in rows]
    if everything:
        yield intervals.rate(metric, everything, "lower")
    for name, rows in slices.items():
        yield intervals.rate(metric, [wrong(opened) for opened in rows], "lower", name)
