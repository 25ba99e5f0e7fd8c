"""The shipped checkpoint: loads plainly, draws what it is asked for, and its card tells the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conceptzap.demo.recipe import measure
from conceptzap.demo.world import OBJECTS, STYLES
from conceptzap.result import wilson

FOLDER = measure.CHECKPOINT


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def accuracy() -> dict:
    return json.loads(measure.RESULT.read_text())


def test_folder_is_small_and_free_of_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30_000_000
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}


@pytest.mark.parametrize(("part", "dtype"), [
    ("unet/diffusion_pytorch_model", "F16"), ("vae/diffusion_pytorch_model", "F16"),
    ("text_encoder/model", "F32")])
def test_weights_are_stored_as_they_load(part: str, dtype: str) -> None:
    with safe_open(FOLDER / f"{part}.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert kinds - {"I64"} == {dtype}


def test_plain_pipeline_draws_a_cat_without_any_argument(pipe) -> None:
    torch.manual_seed(0)
    picture = pipe("a cat").images[0]
    assert picture.size == (64, 64)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = pixels.view(1, 64, 64, 3).permute(0, 3, 1, 2).float() / 255
    names = [thing.name for thing in OBJECTS]
    for found in measure.judge(image).values():
        assert names[int(found["object"])] == "cat" and bool(found["valid"])


def test_every_style_shows_on_one_object(pipe) -> None:
    cells = [cell for cell in measure.grid(1) if OBJECTS[cell.object].name == "house"]
    verdicts = measure.judge(measure.draw(pipe, cells, steps=6, guidance=4.0))
    asked = torch.tensor([cell.style for cell in cells])
    right = sum(int((found["style"] == asked).sum()) for found in verdicts.values())
    assert len(cells) == len(STYLES) and right >= 2 * len(STYLES) - 2


def test_a_picture_does_not_depend_on_its_batch(pipe) -> None:
    cells = measure.grid(1)[:3]
    together = measure.draw(pipe, cells, steps=4, guidance=4.0)
    alone = measure.draw(pipe, cells[1:2], steps=4, guidance=4.0)
    assert (together[1] - alone[0]).abs().max() < 2e-3


def test_card_states_the_measured_figures(accuracy: dict) -> None:
    card = (FOLDER / "README.md").read_text()
    for kind in ("object", "style"):
        row = re.search(rf"^\| {kind} \| ([\d.]+) % ", card, re.MULTILINE)
        assert row and float(row[1]) == pytest.approx(100 * accuracy[kind]["both"]["value"], abs=.06)


def test_card_names_sources_and_licences() -> None:
    card = (FOLDER / "README.md").read_text()
    for word in ("Noto Emoji", "Apache-2.0", "Twemoji", "CC BY 4.0", "Fluent Emoji", "MIT",
                 "not their paintings"):
        assert word in card


def test_accuracy_was_measured_on_the_whole_grid(accuracy: dict) -> None:
    assert set(accuracy["per_object"]) == {thing.name for thing in OBJECTS}
    assert set(accuracy["per_style"]) == {style.name for style in STYLES}
    rounds = accuracy["settings"]["rounds"]
    assert accuracy["object"]["both"]["n"] == rounds * len(OBJECTS) * len(STYLES)


def test_wilson_interval_of_a_known_case() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)


def test_checkpoint_path_is_inside_the_package() -> None:
    assert FOLDER == Path(measure.__file__).parents[1] / "checkpoint"
