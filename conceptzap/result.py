"""What is measured: settings of the drawing, probes that are asked, scores that come back. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from conceptzap.errors import UsageError

MAX_SEED = 2**63 - 1
LARGEST = 2048  # pixels in height or width
SAMPLERS = ("ddim", "euler", "dpm++")
RESULT_SCHEMA = "conceptzap.result/1"


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; two results are comparable only when these are equal.

    `steps` DDIM steps (1 to 1000), `guidance` classifier-free guidance scale (0 to 50, up to 1 is none),
    `negative` the negative prompt, `batch` pictures a UNet call, `scheduler` one of `SAMPLERS`,
    `height` and `width` in pixels (None: the checkpoint's own).
    """

    steps: int = 20
    guidance: float = 4.0
    negative: str = ""
    batch: int = 1
    scheduler: str = "ddim"
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise UsageError(f"--steps {self.steps} is out of range", "use 1 to 1000")
        if not (math.isfinite(self.guidance) and 0 <= self.guidance <= 50):
            raise UsageError(f"--guidance {self.guidance} is out of range", "use 0 to 50")
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is out of range", "use 1 or more")
        if self.scheduler not in SAMPLERS:
            known = f"use {', '.join(SAMPLERS)}"
            raise UsageError(f"no sampler is called {self.scheduler!r}", known)
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and not (8 <= side <= LARGEST and side % 8 == 0):
                hint = f"use a multiple of 8 up to {LARGEST}"
                raise UsageError(f"--{name} {side} is out of range", hint)

    def record(self) -> dict[str, object]:
        """All that was said; a size that was not is the checkpoint's own."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_seed(seed: int) -> int:
    """The seed itself if 0 <= seed < 2^63, else a `UsageError`."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"--seed {seed} is out of range", "use 0 to 2^63-1")
    return seed


@dataclass(frozen=True)
class Probe:
    """One picture to ask for. `slice` names the group it is counted in; `expect` what it should show.

    `expect`: (kind, label) pairs, kind "object", "style", ...; empty where nothing is judged.
    `concept`: the erased concept that the prompt calls for, "" when it calls for none.
    """

    slice: str
    prompt: str
    seed: int
    expect: tuple[tuple[str, str], ...] = ()
    concept: str = ""
    origin: str = ""

    @property
    def erases(self) -> bool:
        """Whether the concept must be gone from this picture."""
        return bool(self.concept)

    def labels(self, kind: str) -> tuple[str, ...]:
        return tuple(label for name, label in self.expect if name == kind)

    def record(self) -> dict[str, object]:
        return {**asdict(self), "expect": [list(pair) for pair in self.expect]}


@dataclass(frozen=True)
class Score:
    """One number with its 95 % interval over n pictures, which holds it. `better`: "lower" or "higher"."""

    metric: str
    value: float
    low: float
    high: float
    n: int
    better: str = "higher"
    slice: str = ""

    def __post_init__(self) -> None:
        # limits are sums of their own, which may stop a rounding short of the value
        object.__setattr__(self, "low", min(self.low, self.value))
        object.__setattr__(self, "high", max(self.high, self.value))

    def record(self) -> dict[str, object]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate, as fractions; (0, 1) for n = 0 (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class Result:
    """What an evaluation found, and everything that must be equal for two of them to be compared.

    `subject`: files with digest and strength, concepts with their share of the split; `base`: id,
    family, digest; `probes`: digest of the open probes; `failed`: the checks that void or fail it;
    `counts`: pictures gone, drawn and kept, each as [how many, of how many] (`estimates.counts`);
    `oracle`: the scores of a model trained without the concept, by name, where they are known.
    No dates and no seconds: the same run gives the same record.
    """

    subject: dict[str, Any]
    base: dict[str, Any]
    suite: str
    settings: dict[str, Any]
    seed: int
    judges: list[dict[str, str]]
    probes: str
    scores: tuple[Score, ...]
    failed: tuple[dict[str, str], ...] = ()
    counts: dict[str, list[int]] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {"schema": RESULT_SCHEMA, **asdict(self)}

    @classmethod
    def from_record(cls, record: Any) -> Result:
        """The result a record holds; `UsageError` when it is none or of another version."""
        known = {entry.name for entry in fields(cls)}
        if not isinstance(record, dict) or record.get("schema") != RESULT_SCHEMA:
            raise UsageError("not a result of `conceptzap evaluate`", "give its result.json")
        try:
            # results of earlier versions have no counts
            values = {key: record[key] for key in known if key != "counts" or key in record}
            scores = tuple(Score(**score) for score in values.pop("scores"))
            return cls(**values | {"failed": tuple(values["failed"])}, scores=scores)
        except (KeyError, TypeError) as error:
            raise UsageError(f"a damaged result: {error}", "evaluate again") from error

    def score(self, metric: str, slice: str = "") -> Score | None:
        return next((s for s in self.scores if (s.metric, s.slice) == (metric, slice)), None)

    def experiment(self) -> dict[str, Any]:
        """What must be equal to be comparable, by name."""
        return {
            "base": self.base["digest"],
            "suite": self.suite,
            "settings": self.settings,
            "seed": self.seed,
            "judges": self.judges,
            "prompts and seeds": self.probes,
        }


def check_comparable(results: Sequence[Result]) -> None:
    """Raise `UsageError` naming what differs unless all results are of one experiment."""
    first, *rest = (result.experiment() for result in results)
    for number, other in enumerate(rest, 2):
        differs = [name for name, value in first.items() if other[name] != value]
        if differs:
            raise UsageError(
                f"result {number} cannot be compared with result 1: {', '.join(differs)} differ",
                "evaluate both with the same base, suite, concepts, settings and classifiers",
            )
