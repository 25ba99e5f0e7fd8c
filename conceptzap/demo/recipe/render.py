"""Render the demo's world: objects on coloured grounds, in every style, at 64 pixels.

Everything is seeded by crc32 of names, so any process renders the same picture. Variety that no
concept carries (mirroring, rotation, scale, hue) is kept small: a model has to spend capacity and
time on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from conceptzap.demo.recipe import art
from conceptzap.demo.recipe.styles import OPERATORS
from conceptzap.demo.world import OBJECTS, STYLES

SIZE = 64
PLACEMENTS = 8
PAIRS_PER_OBJECT = 2
_GROUNDS = (
    ((196, 222, 245), (150, 192, 226)), ((250, 226, 184), (240, 196, 140)),
    ((206, 236, 206), (158, 208, 166)), ((244, 208, 216), (228, 166, 184)),
    ((222, 212, 244), (184, 170, 222)), ((250, 242, 196), (232, 214, 140)),
    ((190, 230, 228), (140, 200, 200)), ((226, 222, 214), (190, 184, 174)),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One picture to render: one object, or two side by side (`right` is then a name)."""

    object: str
    style: str
    drawing: str
    placement: int
    right: str = ""


def seed(*names: object) -> int:
    """A seed that is the same in every process."""
    return zlib.crc32(":".join(map(str, names)).encode())


def catalogue() -> list[Item]:
    """Every picture of the training set, in a fixed order."""
    singles = [
        Item(thing.name, style.name, drawing, placement)
        for thing in OBJECTS for style in STYLES for drawing in art.DRAWINGS
        for placement in range(PLACEMENTS)
    ]
    return singles + list(_pairs())


def _pairs() -> Iterable[Item]:
    """A seeded sample of two-object pictures, about one in eighteen."""
    for style in STYLES:
        for thing in OBJECTS:
            rng = np.random.default_rng(seed("pair", thing.name, style.name))
            others = [other.name for other in OBJECTS if other.name != thing.name]
            for right in rng.choice(others, PAIRS_PER_OBJECT, replace=False):
                drawing = art.DRAWINGS[int(rng.integers(len(art.DRAWINGS)))]
                yield Item(thing.name, style.name, drawing, int(rng.integers(PLACEMENTS)),
                           str(right))


def render(item: Item, drawings: dict[tuple[str, str], Image.Image]) -> np.ndarray:
    """The picture of an item, uint8 [64, 64, 3]."""
    rng = np.random.default_rng(
        seed("place", item.object, item.right, item.drawing, item.placement))
    plain = _compose(item, drawings, rng).astype(np.float64) / 255
    texture = np.random.default_rng(seed("texture", item.style, item.placement))
    styled = OPERATORS[item.style](plain, texture)
    half = styled.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    return np.clip(half * 255 + 0.5, 0, 255).astype(np.uint8)


def _compose(
    item: Item, drawings: dict[tuple[str, str], Image.Image], rng: np.random.Generator
) -> np.ndarray:
    scene = _ground(_GROUNDS[int(rng.integers(len(_GROUNDS)))])
    if item.right:
        for name, centre in ((item.object, 0.27), (item.right, 0.73)):
            _place(scene, drawings[name, item.drawing], rng, (0.46, 0.52), centre, 0.02)
    else:
        _place(scene, drawings[item.object, item.drawing], rng, (0.78, 0.92), 0.5, 0.03)
    return np.asarray(scene.convert("RGB"))


def _ground(colours: tuple[tuple[int, ...], tuple[int, ...]]) -> Image.Image:
    top, bottom = (np.array(colour, dtype=float) for colour in colours)
    fade = np.linspace(0, 1, art.SIZE)[:, None, None]
    rows = np.broadcast_to(top * (1 - fade) + bottom * fade, (art.SIZE, art.SIZE, 3))
    return Image.fromarray(rows.astype(np.uint8)).convert("RGBA")


def _place(
    scene: Image.Image, drawing: Image.Image, rng: np.random.Generator,
    scales: tuple[float, float], centre: float, wander: float,
) -> None:
    """Paste one drawing, slightly turned, about `centre` of the width."""
    side = int(art.SIZE * rng.uniform(*scales))
    turned = drawing.rotate(rng.uniform(-6, 6), Image.BICUBIC).resize((side, side), Image.LANCZOS)
    shift = rng.uniform(-wander, wander, 2) * art.SIZE
    left = int(art.SIZE * centre - side / 2 + shift[0])
    top = int((art.SIZE - side) / 2 + shift[1])
    limit = art.SIZE - side
    scene.alpha_composite(turned, (min(max(left, 0), limit), min(max(top, 0), limit)))


_drawings: dict[tuple[str, str], Image.Image] = {}


def _start_worker(tarballs: Path) -> None:
    _drawings.update(art.read_drawings(tarballs, OBJECTS))


def _render_one(item: Item) -> np.ndarray:
    return render(item, _drawings)


def render_all(items: list[Item], tarballs: Path, workers: int) -> np.ndarray:
    """All pictures of `items`, uint8 [n, 64, 64, 3], rendered by several processes."""
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tarballs,)) as pool:
        return np.stack(list(pool.map(_render_one, items, chunksize=64)))
