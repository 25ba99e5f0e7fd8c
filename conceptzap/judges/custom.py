"""Your own judge: `module:function`, given pictures, answers labels by kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from conceptzap.errors import ResourceError
from conceptzap.evaluation.comparison import Prediction
from conceptzap.evaluation.judging import signature_of
from conceptzap.evaluation.probes import World

Answer = Mapping[str, Sequence[Any]]


class CustomJudge:
    """Wraps `function(pictures uint8 [n, h, w, 3]) -> {kind: [label or ranked labels, ...]}`.

    The answer may also hold "valid" [n] and "features" [n, d]. Labels it knows: `function.kinds`
    where there is one, else every label of the suite.
    """

    def __init__(self, name: str, function: Callable[[Any], Answer], world: World | None) -> None:
        self.name, self.function, self.digest = name, function, signature_of(function)
        subjects = world.subjects if world else ()
        known: dict[str, tuple[str, ...]] = {}
        for subject in subjects:
            known[subject.kind] = (*known.get(subject.kind, ()), subject.name)
        self.kinds = {k: tuple(v) for k, v in getattr(function, "kinds", known).items()}

    def predict(self, pictures: Any) -> Prediction:
        array = np.asarray(pictures)
        answer = dict(self.function(array))
        valid = np.asarray(answer.pop("valid", np.ones(len(array), bool)), bool)
        features = np.asarray(answer.pop("features", np.zeros((len(array), 0))), np.float32)
        labels = {kind: [_ranked(one) for one in rows] for kind, rows in answer.items()}
        for kind, rows in labels.items():
            if len(rows) != len(array):
                raise ResourceError(
                    f"the classifier {self.name} answered {len(rows)} times for {len(array)} pictures",
                    f"answer one {kind} (or a ranking) for each picture",
                )
        scores = {kind: [(1.0,) * len(row) for row in rows] for kind, rows in labels.items()}
        return Prediction(labels, scores, valid, features)


def _ranked(answer: Any) -> tuple[str, ...]:
    if answer is None:
        return ()
    return (answer,) if isinstance(answer, str) else tuple(map(str, answer))


def load(base: Any, option: str, world: World | None = None) -> tuple[CustomJudge, ...]:
    """The judge at `module:function`; `ResourceError` where it cannot be imported or called."""
    module, _, name = option.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ResourceError(
            f"the classifier {option!r} cannot be imported: {error}",
            "name module:function, with the module on PYTHONPATH",
        ) from error
    if not callable(function):
        raise ResourceError(f"the classifier {option!r} is not callable", "name a function")
    return (CustomJudge(option, function, world),)
