"""What the page asks for, done by the verbs of the command line. No gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from conceptzap import api
from conceptzap.base import Base, load_base
from conceptzap.errors import ThresholdError, UsageError
from conceptzap.evaluation import phrases
from conceptzap.format import naming, read_header, remote
from conceptzap.page import card
from conceptzap.report import Report
from conceptzap.terminal import listing
from conceptzap.trust import admission
from conceptzap.verbs import inspecting, reading

SIDE = 512  # pixels that small pictures are enlarged to
Telling = Callable[[float, str], None]


class Told(Report):
    """Hands on how far the work is, 0 to 1, with what is being done, and warnings."""

    def __init__(self, tell: Telling, warn: Callable[[str], None]) -> None:
        super().__init__()
        self.tell, self.warned = tell, warn

    def warn(self, text: str) -> None:
        self.warned(text)

    def phase(self, text: str) -> None:
        self.tell(0.0, text)

    def progress(self, events: Iterable[Any]) -> Iterator[Any]:
        for event in events:
            terms = ", ".join(f"{name} {value:.3g}" for name, value in event.terms.items())
            self.tell(event.step / event.total, f"training, step {event.step} of {event.total}: {terms}")
            yield event

    def count(self, items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        for number, item in enumerate(items, 1):
            self.tell(number / total, f"{label}, {number} of {total}")
            yield item


@dataclass(frozen=True)
class Receipt:
    """What became of one erasure in a picture: whether it was ever open, and what its gates read."""

    name: str
    digest: str
    strength: float
    fired: bool
    words: list[tuple[str, float | None]]


@dataclass(frozen=True)
class Shown:
    """Pictures uint8 [h, w, 3] of one seed, and a receipt for every erasure."""

    before: np.ndarray
    after: np.ndarray
    receipts: list[Receipt]


@dataclass(frozen=True)
class Desk:
    """A folder of erasures, and where bases compute (`load_base`: what the words mean)."""

    folder: Path
    device: str = "auto"
    dtype: str = "auto"
    prediction: str | None = None

    def base(self, name: str) -> Base:
        """The base, kept until another is asked for."""
        return _opened(name, self.device, self.dtype, self.prediction)

    def erasures(self) -> list[str]:
        """The folder's files as they may be named from there."""
        return [naming.bare(path.name) for path in inspecting.erasures_in(self.folder)]

    def located(self, name: str) -> Path:
        """A file that the page names: in the folder, or as it is."""
        if remote.is_name(name):
            return naming.existing(name)
        inside = naming.existing(self.folder / name)
        return inside if inside.exists() else naming.existing(name)

    def example(self) -> str:
        """A prompt that asks for what the first of the files erases."""
        if not (names := self.erasures()):
            return "a cat by Van Gogh"
        return card.telling(read_header(self.located(names[0])).header)


@lru_cache(maxsize=1)
def _opened(name: str, device: str, dtype: str, prediction: str | None) -> Base:
    return load_base(name, device, dtype, prediction)


def draw(
    desk: Desk, base: str, files: Sequence[str], strengths: Mapping[str, float], prompt: str,
    seed: float, steps: float, report: Report,
) -> Shown:  # fmt: skip
    """The same seed before and after; raises what `generate` raises."""
    if not prompt.strip():
        raise UsageError("no picture was asked for", "write a prompt, for example: a cat")
    asked = [(desk.located(name), float(strengths.get(name, 1))) for name in files]
    report.phase(f"loading {base}")
    here = desk.base(base)
    pictures = api.generate(
        prompt, erasures=asked, base=here, seed=int(seed), steps=int(steps) or None,
        strengths=(0, 1) if asked else (1,), report=report,
    )  # fmt: skip
    drawn = list(pictures)
    told = {one["digest"]: one for one in drawn[-1].erasures}
    receipts = [
        Receipt(one.erasure.header.title, digest, one.strength, told[digest]["fired"],
                reading.margins(here, one.erasure.edits, prompt))
        for one in admission.load_all(asked) if (digest := one.erasure.digest) in told
    ]  # fmt: skip
    before, after = (_enlarged(one.array) for one in (drawn[0], drawn[-1]))
    return Shown(before, after, receipts)


def _enlarged(picture: np.ndarray) -> np.ndarray:
    times = max(1, SIDE // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


@dataclass(frozen=True)
class Made:
    """A file that was made, by its name in its folder; `said` of it, and its scores as rows of texts."""

    name: str
    said: str
    scores: list[tuple[str, str, str, str]]


def erase(
    desk: Desk, base: str, concept: str, anchor: str, method: str, preset: str, steps: float, name: str,
    report: Report,
) -> Made:  # fmt: skip
    """A new file; raises what `erase` raises, but for a concept that is still drawn, which is said."""
    if not concept.strip():
        raise UsageError("no concept is named", "for example: Van Gogh")
    output = desk.folder / name.strip() if name.strip() else f"{desk.folder}/"
    try:
        made = api.erase(
            concept.strip(), anchors=anchor.strip() or (), method=method or None, preset=preset or None,
            base=desk.base(base), steps=int(steps) or None, output=output, report=report,
        )  # fmt: skip
        said = made.verdict
    except ThresholdError as error:
        made, said = error.made, f"{error}; {error.hint}"
    cost = f"{listing.size(made.bytes)} in {made.seconds:.0f} s, digest {made.digest[:12]}"
    scores = [
        (phrases.CLOSING.get(label, label),
         f"{100 * one.value:.1f} %", f"{100 * one.low:.1f} to {100 * one.high:.1f} %", str(one.n))
        for label, one in made.scores.items()
    ]
    return Made(naming.bare(made.path.name), f"{said}\n{made.method}: {cost}", scores)
