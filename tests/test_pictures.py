"""PNGs that say how they were made, and contact sheets that say what they show."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conceptzap.errors import ConceptZapError, FormatError, UsageError
from conceptzap.format.pictures import (
    GAP,
    Block,
    contact_sheet,
    encode_png,
    read_text,
    save_png,
    side_by_side,
)


def picture(seed: int = 0, height: int = 16, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


TEXT = {
    "prompt": 'a cat, "in the style of" Van Gogh\nsecond line',
    "unicode": "église 🏰 кошка",
    "settings": '{"steps": 20}',
    "empty": "",
}


def test_pixels_and_text_come_back(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, picture(), TEXT)
    assert read_text(path) == TEXT
    with Image.open(path) as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), picture())
    assert os.listdir(tmp_path) == ["a.png"]


def test_equal_input_gives_equal_bytes():
    turned = dict(reversed(TEXT.items()))
    assert encode_png(picture(), TEXT) == encode_png(picture(), turned)
    assert encode_png(picture(), TEXT) != encode_png(picture(1), TEXT)


def test_a_view_is_written_as_it_looks(tmp_path):
    view = picture(0, 20, 20)[::-2, ::3]
    save_png(tmp_path / "a.png", view, {})
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), view)


def test_torch_tensors_are_pictures(tmp_path):
    import torch

    save_png(tmp_path / "a.png", torch.from_numpy(picture()), {})
    assert Image.open(tmp_path / "a.png").size == (12, 16)


def test_prompts_that_png_cannot_hold(tmp_path):
    save_png(tmp_path / "a.png", picture(), {"prompt": "a\0b\ud800c", "other": "\0 é"})
    assert read_text(tmp_path / "a.png") == {"prompt": "a\ufffdb\ufffdc", "other": "\ufffd é"}


def test_nothing_is_overwritten_without_force(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, picture(), {})
    with pytest.raises(UsageError, match="exists"):
        save_png(path, picture(1), {})
    assert path.read_bytes() == encode_png(picture(), {})
    save_png(path, picture(1), {}, force=True)
    assert path.read_bytes() == encode_png(picture(1), {})


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture(array, tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        save_png(tmp_path / "a.png", array, {})
    assert not os.listdir(tmp_path)


def test_keys_that_png_cannot_hold():
    for key in ("", "x" * 80):
        with pytest.raises(ValueError, match="keyword"):
            encode_png(picture(), {key: "x"})


def test_reading_what_is_no_png(tmp_path):
    jpeg = io.BytesIO()
    Image.fromarray(picture()).save(jpeg, "JPEG")
    for data in (b"", b"text", jpeg.getvalue(), encode_png(picture(), TEXT)[:60]):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(FormatError, match="no sound PNG"):
            read_text(tmp_path / "a.png")
    with pytest.raises(FormatError, match="no such file"):
        read_text(tmp_path / "b.png")
    with pytest.raises(FormatError, match="is a folder"):
        read_text(tmp_path)


def test_a_damaged_png_raises_nothing_else(tmp_path):
    data = encode_png(picture(0, 2, 2), {"prompt": "a cat", "unicode": "🏰"})
    path = tmp_path / "a.png"
    for place in range(len(data)):
        changed = bytes([data[place] ^ 0x55])
        for damaged in (data[:place], data[:place] + changed + data[place + 1 :]):
            path.write_bytes(damaged)
            with contextlib.suppress(ConceptZapError):
                read_text(path)


# -- contact sheets --------------------------------------------------------------------------------


def cell(sheet: np.ndarray, row: int, column: int, count: int, high: int, wide: int) -> np.ndarray:
    """The pixels of a cell, from the right and the top, where labels cannot shift them."""
    top = GAP + row * (high + GAP)
    left = sheet.shape[1] - (count - column) * (wide + GAP)
    return sheet[top : top + high, left : left + wide]


def test_every_picture_is_in_its_place():
    rows = [("base", [picture(1), picture(2)]), ("erased", [picture(3), picture(4)])]
    sheet = side_by_side(rows)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    for row, (_, pictures) in enumerate(rows):
        for column, one in enumerate(pictures):
            assert np.array_equal(cell(sheet, row, column, 2, 16, 12), one)


def test_scale_repeats_pixels():
    sheet = side_by_side([("", [picture()])], scale=3)
    shown = cell(sheet, 0, 0, 1, 48, 36)
    assert np.array_equal(shown[::3, ::3], picture())
    assert np.array_equal(shown[2::3, 1::3], picture())


def test_labels_are_drawn_beside_their_rows():
    rows = [("base", [picture(1, 40, 40)]), ("erased", [picture(2, 40, 40)])]
    labelled, bare = side_by_side(rows), side_by_side([("", one) for _, one in rows])
    left = labelled.shape[1] - bare.shape[1]
    assert left > 20
    for row in (0, 1):
        band = labelled[GAP + row * 44 : 44 + row * 44, :left]
        assert (band < 128).any(), "no ink"
        assert (band[:, 0] == 255).all(), "cut off"
    swapped = side_by_side([("erased", rows[0][1]), ("base", rows[1][1])])
    assert not np.array_equal(labelled, swapped)


def test_accents_become_letters_that_the_font_has():
    def shown(label: str) -> np.ndarray:
        return side_by_side([(label, [picture(0, 40, 40)])])

    assert np.array_equal(shown("église"), shown("eglise"))
    assert np.array_equal(shown("кот"), shown("???"))


LABELS = ["word " * 60, "x" * 300, "église 🏰 кошка 中文", "a\x1b[2J\nb\u202e", ""]


@pytest.mark.parametrize("label", LABELS)
def test_any_label_fits(label):
    sheet = side_by_side([(label, [picture(0, 64, 64)]), ("b", [picture(1, 64, 64)])])
    assert np.array_equal(cell(sheet, 0, 0, 1, 64, 64), picture(0, 64, 64))
    assert np.array_equal(cell(sheet, 1, 0, 1, 64, 64), picture(1, 64, 64))
    assert sheet.shape[1] < 64 + 200


def test_rows_may_differ_in_length_and_pictures_in_size():
    sheet = side_by_side([("a", [picture(0)]), ("b", [picture(1), picture(2, 8, 8)])])
    assert np.array_equal(cell(sheet, 0, 0, 2, 16, 12), picture(0))
    assert np.array_equal(cell(sheet, 1, 1, 2, 16, 12)[:8, :8], picture(2, 8, 8))
    assert (cell(sheet, 0, 1, 2, 16, 12) == 255).all()


def test_captions_stand_under_their_columns():
    rows = [("a", [picture(0, 64, 64), picture(1, 64, 64)])]
    plain = contact_sheet("", [Block((), rows)])
    sheet = contact_sheet("", [Block((), rows, ["a cat\nseed 1", "a dog"])])
    high = plain.shape[0]
    assert sheet.shape[1] == plain.shape[1] and np.array_equal(sheet[: high - GAP], plain[: high - GAP])
    under = sheet[high - GAP :]
    left = sheet.shape[1] - 2 * 68
    for column in (0, 1):
        assert (under[:, left + 68 * column :][:, :68] < 128).any(), "no ink"
    assert not (under[:, : left - 1] < 128).any()


def test_sheet_without_pictures():
    with pytest.raises(ValueError, match="needs a picture"):
        side_by_side([("a", [])])


def test_importing_pictures_needs_no_torch():
    code = "import sys, conceptzap.format.pictures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
