"""Pictures as files: PNGs that say how they were made, and labelled contact sheets. No torch."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from conceptzap.errors import FormatError, escape
from conceptzap.format.atomic import read_regular, write_atomic

FILE_LIMIT = 256 * 2**20
# a PNG keyword has 1 to 79 Latin-1 characters
KEYWORD_LENGTH = 79
GAP = 4
FONT_SIZE, SMALL, LINE = 13, 10, 14
LABEL_WIDTH = 160
PAPER, INK = (255, 255, 255), (20, 20, 20)
NOT_PNG = "name a PNG picture"
Rows = Sequence[tuple[str, Sequence[np.ndarray]]]


def save_png(
    path: Path | str, array: np.ndarray, text: Mapping[str, str], force: bool = False
) -> None:
    """Write a picture [h, w, 3] uint8 with its text entries, as atomically as `write_atomic`."""
    write_atomic(path, encode_png(array, text), force)


def encode_png(array: np.ndarray, text: Mapping[str, str]) -> bytes:
    """PNG bytes of a picture [h, w, 3] uint8, equal for equal input; else a `ValueError`."""
    info = PngInfo()
    for key in sorted(text):
        if not 1 <= len(key.encode("latin-1")) <= KEYWORD_LENGTH:
            raise ValueError(f"{key!r} is no PNG keyword")
        info.add_text(key, _storable(text[key]))
    buffer = io.BytesIO()
    Image.fromarray(_checked(array)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def thumbnail(images: Sequence[np.ndarray], side: int = 64) -> str:
    """Pictures [h, w, 3] uint8 beside each other, `side` px high, as a data URI: equal for equal input."""
    small = []
    for image in map(_checked, images):
        size = (max(1, round(image.shape[1] * side / image.shape[0])), side)
        small.append(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(small, 1)).save(buffer, "WEBP", quality=50, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _storable(text: str) -> str:
    """Text with the replacement character for what PNG cannot hold: NUL and lone surrogates."""
    units = text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass")
    return units.decode("utf-16", "replace")


def _checked(array: np.ndarray) -> np.ndarray:
    picture = np.asarray(array)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"a picture is [h, w, 3] uint8, not {picture.shape} {picture.dtype}")
    return picture


def read_text(path: Path | str) -> dict[str, str]:
    """The text entries of a PNG; raises `FormatError` when it is missing, damaged or no PNG."""
    data = read_regular(path, FILE_LIMIT)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            text = cast(PngImageFile, picture).text
            return {key: str(value) for key, value in text.items()}
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise FormatError(f"{escape(path)} is no sound PNG: {escape(error)}", NOT_PNG) from error


class Block(NamedTuple):
    """Rows of a contact sheet, each a label and its pictures; captions over the columns, or `under` them."""

    captions: Sequence[str]
    rows: Rows
    under: Sequence[str] = ()


def side_by_side(rows: Rows, scale: int = 1) -> np.ndarray:
    """A contact sheet [h, w, 3] uint8 of rows: a label and pictures, `scale` times as large.

    Rows may differ in length and pictures in size; a cell is as large as the largest picture.
    """
    return contact_sheet("", [Block((), rows)], scale)


def contact_sheet(title: str, blocks: Sequence[Block], scale: int = 1) -> np.ndarray:
    """Blocks of rows below one another [h, w, 3] uint8, under a title; see `side_by_side`."""
    rows = [row for block in blocks for row in block.rows]
    large = [[_enlarge(_checked(one), scale) for one in row] for _, row in rows]
    cells = [one for row in large for one in row]
    if not cells:
        raise ValueError("a contact sheet needs a picture")
    # 1. measures: a cell, the labels on the left, the lines above and below every block
    high, wide = (max(one.shape[axis] for one in cells) + GAP for axis in (0, 1))
    left = _label_width([_drawable(label) for label, _ in rows]) + GAP
    captions, feet = (
        [[_caption(text, wide - GAP) for text in texts] for texts in column]
        for column in zip(*((block.captions, block.under) for block in blocks), strict=True)
    )
    above, below = (
        [max(map(len, lines), default=0) * LINE for lines in texts] for texts in (captions, feet)
    )
    width = left + max(map(len, large)) * wide
    heading = _lines(_drawable(title), width - 2 * GAP)
    top = len(heading) * (FONT_SIZE + GAP)
    height = top + len(rows) * high + sum(above) + sum(below) + GAP
    sheet, pictures = Image.new("RGB", (width, height), PAPER), iter(large)
    ImageDraw.Draw(sheet).text((GAP, GAP), "\n".join(heading), INK, _font())
    # 2. block by block
    for number, block in enumerate(blocks):
        top += above[number]
        for column, text in enumerate(captions[number]):
            _write_caption(sheet, text, left + column * wide, top - len(text) * LINE + GAP)
        for label, _ in block.rows:
            _write_label(sheet, _drawable(label), left, top + GAP, high - GAP)
            for column, one in enumerate(next(pictures)):
                sheet.paste(Image.fromarray(one), (left + column * wide, top + GAP))
            top += high
        for column, text in enumerate(feet[number]):
            _write_caption(sheet, text, left + column * wide, top)
        top += below[number]
    return np.asarray(sheet)


def _write_caption(sheet: Image.Image, lines: Sequence[str], left: int, top: int) -> None:
    spacing = LINE - SMALL
    ImageDraw.Draw(sheet).text((left, top), "\n".join(lines), INK, _font(SMALL), spacing=spacing)


def _caption(text: str, width: int) -> list[str]:
    """The lines of a caption, broken where they are too wide."""
    return [line for part in text.split("\n") for line in _lines(_drawable(part), width, SMALL)]


def _enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def _font(size: int = FONT_SIZE) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _drawable(label: str) -> str:
    """The label in ASCII, which is all that Pillow's own font has: no accents, ? for the rest."""
    letters = unicodedata.normalize("NFKD", escape(label))
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return plain.encode("ascii", "replace").decode()


def _label_width(labels: Sequence[str]) -> int:
    """Pixels the widest label takes, at most `LABEL_WIDTH`; 0 when there are none."""
    widest = max((_font().getlength(label) for label in labels if label), default=-GAP)
    return min(LABEL_WIDTH, int(widest) + GAP)


def _write_label(sheet: Image.Image, label: str, left: int, top: int, height: int) -> None:
    """The label beside its row, centred; broken into lines where too wide, cut where too long."""
    lines = _lines(label, left - 2 * GAP)
    line_height = FONT_SIZE + 3
    shown = lines[: max(1, height // line_height)]
    draw = ImageDraw.Draw(sheet)
    first = top + max(0, (height - len(shown) * line_height) // 2)
    for number, line in enumerate(shown):
        draw.text((GAP, first + number * line_height), line, INK, _font())


def _lines(text: str, width: int, size: int = FONT_SIZE) -> list[str]:
    """Words in lines of at most `width` pixels; a single word may be wider."""
    font = _font(size)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
