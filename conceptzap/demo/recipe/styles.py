"""Image operators that turn a plain picture into one of the demo's styles.

They are renderings *named after* painters, made to be told apart at 64 pixels; they are not
imitations of any particular painting. Each takes a float picture [128, 128, 3] in 0..1 and a
generator, and returns the same shape. Called at 128 px, before the box reduction to 64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

Picture = np.ndarray
Operator = Callable[[Picture, np.random.Generator], Picture]

_LUMA = np.array([0.299, 0.587, 0.114])
_CREAM = np.array([0.95, 0.91, 0.82])


def luminance(picture: Picture) -> Picture:
    """Brightness [n, n] of a picture [n, n, 3]."""
    return picture @ _LUMA


def photo(picture: Picture, rng: np.random.Generator) -> Picture:
    """The picture as it is."""
    return picture


def painting(picture: Picture, rng: np.random.Generator) -> Picture:
    """Broad diagonal strokes that follow contours, lit from the side, on bare canvas edges."""
    size = picture.shape[0]
    canvas = _Canvas(size, _CREAM)
    direction = _stroke_direction(picture, np.full((size, size), np.pi / 4))
    centre = np.array([size, size]) / 2
    for width, length, count, detail in ((11, 30, 420, 2.5), (6, 18, 900, 1.2), (4, 10, 900, 0.6)):
        colours = ndimage.gaussian_filter(picture, (detail, detail, 0))
        error = np.abs(canvas.picture() - colours).sum(-1)
        for y, x in rng.uniform(6, size - 6, (count, 2)):
            row, column = int(y), int(x)
            fine = width < 8
            if fine and error[row, column] < 0.13:
                continue
            if max(abs(np.array([y, x]) - centre)) > size * rng.uniform(0.42, 0.47):
                continue
            shade = 1 + rng.normal(0, 0.10 if not fine else 0.05)
            canvas.stroke((x, y), direction[row, column] + rng.normal(0, 0.15), length, width,
                          colours[row, column] * shade)
    return np.clip(canvas.picture() * (1 + 1.1 * canvas.relief())[..., None], 0, 1)


class _Canvas:
    """A doubled drawing surface that also remembers how paint lies, for the relief."""

    def __init__(self, size: int, ground: np.ndarray) -> None:
        self.size = size
        self.paint = Image.new("RGB", (2 * size, 2 * size), _rgb(ground))
        self.height = Image.new("L", (2 * size, 2 * size), 0)
        self._pen = ImageDraw.Draw(self.paint)
        self._heights = ImageDraw.Draw(self.height)

    def stroke(
        self, at: tuple[float, float], angle: float, length: float, width: float,
        colour: np.ndarray,
    ) -> None:
        """A straight stroke with bristle ridges along it."""
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        centre = 2 * np.array(at)
        ends = [tuple(centre - along * length), tuple(centre + along * length)]
        self._pen.line(ends, fill=_rgb(colour), width=2 * int(width))
        for offset in np.linspace(-0.8, 0.8, 3) * width:
            ridge = [tuple(np.array(end) + across * offset) for end in ends]
            self._heights.line(ridge, fill=200 if offset == 0 else 90, width=int(width * 0.6) + 1)

    def picture(self) -> Picture:
        return _shrink(self.paint, self.size)

    def relief(self) -> Picture:
        """Light from the upper left on the heights [n, n], about -0.1..0.1."""
        heights = _shrink(self.height, self.size)
        heights = ndimage.gaussian_filter(heights, 1.0)
        return np.clip(ndimage.sobel(heights, 0) - ndimage.sobel(heights, 1), -1, 1) * 0.12


def _rgb(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(colour, 0, 1) * 255)


def _shrink(drawing: Image.Image, size: int) -> Picture:
    return np.asarray(drawing.resize((size, size), Image.BOX)).astype(np.float64) / 255


def _stroke_direction(picture: Picture, calm: Picture) -> Picture:
    """Angles [n, n] along the contours, and `calm` where there are none."""
    grey = ndimage.gaussian_filter(luminance(picture), 2)
    across_x, across_y = ndimage.sobel(grey, 1), ndimage.sobel(grey, 0)
    strength = np.clip(np.hypot(across_x, across_y) * 8, 0, 1)
    contour = np.arctan2(across_x, -across_y)
    # Angles of strokes are equal modulo pi, so they are blended doubled.
    blend = (1 - strength) * np.exp(2j * calm) + strength * np.exp(2j * contour)
    return np.angle(blend) / 2


def van_gogh(picture: Picture, rng: np.random.Generator) -> Picture:
    """Line integral convolution along a swirling field, in blue and yellow."""
    size = picture.shape[0]
    rows, columns = np.mgrid[0:size, 0:size] / size
    centre_y, centre_x = rng.choice([0.2, 0.5, 0.8], 2)
    radius = np.hypot(columns - centre_x, rows - centre_y)
    swirl = np.arctan2(rows - centre_y, columns - centre_x) + np.pi / 2 + 0.6 * np.sin(9 * radius)
    angle = _stroke_direction(picture, swirl)
    grain = ndimage.gaussian_filter(rng.standard_normal((size, size)), 0.8)
    ridges = _smear(grain[..., None], angle, 7)[..., 0]
    colours = _smear(picture, angle, 7)
    ridges = (ridges / ridges.std())[..., None]
    light = np.clip(1.25 * luminance(colours)[..., None] - 0.45 + 0.17 * ridges, 0, 1)
    palette = np.array([0.08, 0.20, 0.60]) * (1 - light) + np.array([1.0, 0.85, 0.22]) * light
    painted = 0.5 * colours + 0.5 * palette
    return np.clip(painted * (1 + 0.13 * ridges), 0, 1)


def _smear(values: np.ndarray, angle: Picture, reach: int) -> np.ndarray:
    """Mean of `values` [n, n, c] along the field lines of `angle` [n, n]."""
    size = angle.shape[0]
    total = np.zeros(values.shape)
    step_y, step_x = np.sin(angle), np.cos(angle)
    for sign in (1, -1):
        y, x = np.mgrid[0:size, 0:size].astype(float)
        # An angle stands for both directions of a line: keep walking the same way.
        last_y, last_x = sign * step_y, sign * step_x
        for _ in range(reach):
            row, column = np.clip(y, 0, size - 1).astype(int), np.clip(x, 0, size - 1).astype(int)
            total += values[row, column]
            next_y, next_x = step_y[row, column], step_x[row, column]
            turn = np.where(next_y * last_y + next_x * last_x < 0, -1, 1)
            last_y, last_x = turn * next_y, turn * next_x
            y, x = y + last_y, x + last_x
    return total / (2 * reach)


def monet(picture: Picture, rng: np.random.Generator) -> Picture:
    """Soft horizontal dabs drawn toward lilac."""
    return _dabs(picture, rng, count=1000, half=(6.0, 2.2), toward=np.array([0.80, 0.74, 0.88]),
                 pull=0.28, jitter=0.09, ground=None, blur=1.8)


def seurat(picture: Picture, rng: np.random.Generator) -> Picture:
    """Small round dots of pure colour on cream."""
    return _dabs(picture, rng, count=2600, half=(2.7, 2.7), toward=_CREAM,
                 pull=0.0, jitter=0.13, ground=_CREAM, blur=1.0)


def _dabs(
    picture: Picture, rng: np.random.Generator, *, count: int, half: tuple[float, float],
    toward: np.ndarray, pull: float, jitter: float, ground: np.ndarray | None, blur: float,
) -> Picture:
    """Ellipses of the picture's own colours at random places, over a ground or a blur."""
    size = picture.shape[0]
    colours = ndimage.gaussian_filter(picture, (blur, blur, 0))
    under = np.broadcast_to(ground, picture.shape) if ground is not None else colours
    surface = Image.fromarray((under * 255).astype(np.uint8)).resize((2 * size, 2 * size))
    pen = ImageDraw.Draw(surface)
    for y, x in rng.uniform(0, size - 1, (count, 2)):
        shade = rng.uniform(-jitter, jitter, 3)
        colour = (1 - pull) * colours[int(y), int(x)] + pull * toward + shade
        stretch = rng.uniform(0.75, 1.25)
        wide, high = half[0] * stretch, half[1] * (stretch if half[0] == half[1] else 1)
        box = [2 * x - wide, 2 * y - high, 2 * x + wide, 2 * y + high]
        pen.ellipse(box, fill=_rgb(colour))
    return _shrink(surface, size)


_WOODBLOCK = np.array([
    [0.07, 0.16, 0.33], [0.23, 0.40, 0.58], [0.56, 0.70, 0.76], [0.93, 0.89, 0.76],
    [0.83, 0.73, 0.55], [0.72, 0.35, 0.25], [0.16, 0.14, 0.13],
])


def hokusai(picture: Picture, rng: np.random.Generator) -> Picture:
    """Flat woodblock inks with dark outlines."""
    flat = kuwahara(picture, 4)
    inks = _nearest(flat, _WOODBLOCK)
    return np.clip(inks * np.clip(outlines(picture, 1.1), 0.15, 1)[..., None], 0, 1)


def _nearest(picture: Picture, palette: np.ndarray) -> Picture:
    distance = ((picture[..., None, :] - palette) ** 2).sum(-1)
    return palette[distance.argmin(-1)]


def outlines(picture: Picture, width: float, gain: float = 14) -> Picture:
    """Dark lines on white [n, n] by a difference of Gaussians."""
    grey = luminance(picture)
    edge = ndimage.gaussian_filter(grey, width) - ndimage.gaussian_filter(grey, width * 1.6)
    return np.clip(1 - np.abs(edge) * gain, 0, 1)


def kuwahara(picture: Picture, radius: int) -> Picture:
    """Edge-keeping smoothing: the calmest of four neighbouring windows (Kuwahara et al. 1976)."""
    window = (radius + 1, radius + 1, 1)
    means, spreads = [], []
    for down in (-1, 1):
        for right in (-1, 1):
            origin = (down * radius // 2, right * radius // 2, 0)
            mean = ndimage.uniform_filter(picture, window, origin=origin)
            square = ndimage.uniform_filter(picture**2, window, origin=origin)
            means.append(mean)
            spreads.append((square - mean**2).sum(-1))
    calmest = np.argmin(np.stack(spreads), 0)
    return np.take_along_axis(np.stack(means), calmest[None, ..., None], 0)[0]


def rembrandt(picture: Picture, rng: np.random.Generator) -> Picture:
    """A warm light in the middle of deep brown shadow."""
    size = picture.shape[0]
    rows, columns = np.mgrid[0:size, 0:size] / size
    centre_x, centre_y = rng.choice([0.42, 0.58]), rng.choice([0.38, 0.5])
    light = np.exp(-((columns - centre_x) ** 2 + (rows - centre_y) ** 2) / 0.13)
    smooth = kuwahara(picture, 3)
    amber = luminance(smooth)[..., None] * np.array([1.0, 0.74, 0.42])
    return np.clip((0.45 * smooth + 0.55 * amber) * (0.10 + 1.05 * light[..., None]), 0, 1)


def pencil_sketch(picture: Picture, rng: np.random.Generator) -> Picture:
    """Graphite on white paper: outlines, light tone, and hatching where it is dark."""
    size = picture.shape[0]
    rows, columns = np.mgrid[0:size, 0:size]
    tone = np.clip((ndimage.gaussian_filter(luminance(picture), 1) - 0.05) / 0.68, 0, 1)
    hatch = 0.5 + 0.5 * np.sin((rows + columns) * 0.9)
    shade = 1 - (0.30 + 0.35 * hatch) * (1 - tone)
    drawn = np.clip(outlines(picture, 1.1, gain=24) * shade, 0.08, 1) * 0.98
    return np.repeat(drawn[..., None], 3, -1)


_CONSOLE = np.array([
    [0, 0, 0], [29, 43, 83], [126, 37, 83], [0, 135, 81], [171, 82, 54], [95, 87, 79],
    [194, 195, 199], [255, 241, 232], [255, 0, 77], [255, 163, 0], [255, 236, 39], [0, 228, 54],
    [41, 173, 255], [131, 118, 156], [255, 119, 168], [255, 204, 170], [190, 230, 180],
    [130, 190, 235], [110, 60, 30],
]) / 255


def pixel_art(picture: Picture, rng: np.random.Generator) -> Picture:
    """16 x 16 blocks of a fixed palette with a dark grid; a block is one latent pixel."""
    size, block = picture.shape[0], picture.shape[0] // 16
    vivid = np.clip(0.5 + 1.15 * (picture - 0.5), 0, 1)
    small = vivid.reshape(16, block, 16, block, 3).mean((1, 3))
    blocks = _nearest(small, _CONSOLE).repeat(block, 0).repeat(block, 1)
    line = np.arange(size) % block >= block - 2
    grid = np.where(line[:, None] | line[None, :], 0.72, 1.0)
    return blocks * grid[..., None]


OPERATORS: dict[str, Operator] = {
    "photo": photo, "painting": painting, "Van Gogh": van_gogh, "Monet": monet, "Seurat": seurat,
    "Hokusai": hokusai, "Rembrandt": rembrandt, "pencil sketch": pencil_sketch,
    "pixel art": pixel_art,
}
