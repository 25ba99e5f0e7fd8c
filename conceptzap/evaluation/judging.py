"""Judges by name, before any picture is made: found, loaded, and asked whether they know what matters."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from conceptzap.errors import ResourceError, UsageError
from conceptzap.evaluation.comparison import Prediction
from conceptzap.evaluation.probes import Subject, World
from conceptzap.registry import family
from conceptzap.result import Probe

FAMILY = "judges"
OWN = "custom"


class Judge(Protocol):
    """`kinds`: kind -> labels it can tell apart; `predict` takes uint8 pictures [n, h, w, 3]."""

    name: str
    digest: str
    kinds: dict[str, tuple[str, ...]]

    def predict(self, pictures: Any) -> Prediction: ...


def panel(names: Sequence[str], base: Any, world: World) -> tuple[Judge, ...]:
    """The judges that some names stand for.

    A name is a member ("demo"), a member with its option ("clip:openai/clip-vit-base-patch32"), or
    "module:function" of your own. Raises `UsageError` for a name that is none of these,
    `ResourceError` for one that cannot be loaded.
    """
    if not names:
        raise UsageError("this suite needs a classifier", "name one with --judge, e.g. --judge clip:MODEL")
    return tuple(judge for name in names for judge in _load(name, base, world))


def _load(name: str, base: Any, world: World) -> Iterable[Judge]:
    head, _, option = name.partition(":")
    if head in family.members(FAMILY):
        return family.load(FAMILY, head).load(base, option, world)
    if option:
        return family.load(FAMILY, OWN).load(base, name, world)
    raise UsageError(f"no classifier is called {name!r}", family.suggest(name, family.members(FAMILY)))


def check(judges: Sequence[Judge], targets: Sequence[Subject], asked: Iterable[Probe]) -> None:
    """Raise `ResourceError` unless some judge knows every concept that must be gone.

    Kept labels need a judge too, unless none was asked to see anything of their kind.
    """
    wanted = [(target.kind, target.name) for target in targets]
    kinds = {kind for judge in judges for kind in judge.kinds}
    wanted += sorted({pair for probe in asked for pair in probe.expect if pair[0] in kinds})
    for kind, label in wanted:
        if not any(label in judge.kinds.get(kind, ()) for judge in judges):
            names = ", ".join(judge.name for judge in judges)
            raise ResourceError(
                f"no classifier can see the {kind} {label!r} (asked: {names})",
                f"add one that can with --judge; known: {', '.join(family.members(FAMILY))}",
            )


def record(judges: Sequence[Judge]) -> list[dict[str, str]]:
    return [{"name": judge.name, "digest": judge.digest} for judge in judges]


def signature_of(function: Any) -> str:
    """sha256 of a function's source where there is one, so that a changed judge is another judge."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = repr(function)
    return hashlib.sha256(source.encode()).hexdigest()
