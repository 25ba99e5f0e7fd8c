"""What a method may say while it works: progress, notes, and where its training is kept. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from conceptzap.training.session import Session

T = TypeVar("T")


class Report:
    """Says nothing and keeps nothing; the command line has one that draws a progress bar."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def note(self, text: str) -> None:
        """One line about what is going on."""

    def warn(self, text: str) -> None:
        """One line about what may not be meant."""
        self.note(f"warning: {text}")

    def phase(self, text: str) -> None:
        """One line about what begins and may take long."""

    def progress(self, events: Iterable[T]) -> Iterator[T]:
        """Pass training events through, showing them on the way."""
        yield from events

    def count(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Pass on the `total` items of some work called `label`, showing how many are done."""
        yield from items

    def session(self, config: Mapping[str, object]) -> Session | None:
        """Where to keep checkpoints of a training with this config; None keeps none."""
        return None
