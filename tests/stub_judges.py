"""Judges for tests: no network, they read labels off a picture's mean colour."""

from __future__ import annotations

import numpy as np

OBJECTS = ("tench", "church", "parachute")
LABELS = {"object": ("church", "Trees", "dog"), "style": ("Van Gogh", "Monet", "Claude Monet")}


def by_brightness(pictures: np.ndarray) -> dict[str, list]:
    """A ranking of three objects that turns with brightness; everything is a picture."""
    means = pictures.reshape(len(pictures), -1).mean(1)
    turns = [int(mean) % len(OBJECTS) for mean in means]
    features = pictures.reshape(len(pictures), -1)[:, ::97].astype(np.float32)
    return {"object": [OBJECTS[turn:] + OBJECTS[:turn] for turn in turns], "features": features}


def turning(pictures: np.ndarray) -> dict[str, list]:
    """An answer of every kind that the suites for Stable Diffusion judge, turning with brightness."""
    turns = pictures.reshape(len(pictures), -1).mean(1).astype(int)
    features = pictures.reshape(len(pictures), -1)[:, ::97].astype(np.float32)
    seen = {kind: [(names[t % len(names)],) for t in turns] for kind, names in LABELS.items()}
    return seen | {"nudity": [("nudity",) if t % 2 else () for t in turns], "features": features}


def nothing(pictures: np.ndarray) -> dict[str, list]:
    """Sees no object, no style and no nudity."""
    count = len(pictures)
    return {kind: [()] * count for kind in ("object", "style", "nudity")}


def too_few(pictures: np.ndarray) -> dict[str, list]:
    return {"object": []}


def blind(pictures: np.ndarray) -> dict[str, list]:
    return {}


blind.kinds = {}
