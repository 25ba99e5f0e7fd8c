"""Judges: one seam, and an error that names what is wanted before any picture is made."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stub_judges  # noqa: F401  (named on the command line)
import torch
from command import conceptzap
from erasures import write

from conceptzap.base import Base
from conceptzap.demo import judge_nets
from conceptzap.errors import ConceptZapError, ResourceError, UsageError
from conceptzap.evaluation import cached, judging, probes, suites
from conceptzap.registry import family

pytestmark = pytest.mark.usefixtures("own_cache")


def pictures(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 64, 64, 3), np.uint8)


def imagenette() -> probes.World:
    return suites.load("imagenette")[1]


def test_both_demo_judges_see_objects_styles_and_validity() -> None:
    judges = judging.panel(["demo"], None, suites.load("smoke")[1])
    assert len(judges) == 2 and judges[0].digest != judges[1].digest
    for judge in judges:
        prediction = judge.predict(pictures())
        assert {len(ranked) for ranked in prediction.labels["object"]} == {5}
        assert prediction.features.shape[0] == 3 and prediction.valid.dtype == bool
        assert not judge.predict(np.full((2, 64, 64, 3), 128, np.uint8)).valid.any(), "grey is no picture"
        assert not prediction.valid.any(), "noise is no picture"


def test_demo_judges_are_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in judge_nets.FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / f"{judge_nets.JUDGES[0]}.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(judge_nets, "FOLDER", tmp_path)
    with pytest.raises(ResourceError, match="frozen hash"):
        judging.panel(["demo"], None, suites.load("smoke")[1])


def test_your_own_function_is_a_judge() -> None:
    (judge,) = judging.panel(["stub_judges:by_brightness"], None, imagenette())
    prediction = judge.predict(pictures())
    assert all(len(ranked) == 3 for ranked in prediction.labels["object"])
    assert prediction.features.shape[1] > 0 and judge.name == "stub_judges:by_brightness"


@pytest.mark.parametrize(
    "name, kind, said",
    [
        ("demmo", UsageError, "no classifier is called"),
        ("demo:x", UsageError, "no option"),
        ("clip", UsageError, "needs a model"),
        ("clip:/nowhere/clip", ResourceError, "no CLIP"),
        ("imagenet", ConceptZapError, "weights"),
        ("imagenet:/nowhere/net.safetensors", ResourceError, "torchvision|network"),
        ("nudenet:2", UsageError, "between 0 and 1"),
        ("no_module:see", ResourceError, "cannot be imported"),
        ("stub_judges:absent", ResourceError, "cannot be imported"),
        ("stub_judges:OBJECTS", ResourceError, "not callable"),
    ],
)
def test_a_missing_judge_names_what_is_wanted(name: str, kind: type[ConceptZapError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        judging.panel([name], None, imagenette())
    assert caught.value.hint


def test_a_judge_that_answers_too_few_times_is_an_error() -> None:
    (judge,) = judging.panel(["stub_judges:too_few"], None, imagenette())
    with pytest.raises(ResourceError, match="0 times for 3 pictures"):
        judge.predict(pictures())


@pytest.fixture
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain installation: neither torchvision nor NudeNet can be imported."""
    for name in ("torchvision", "torchvision.models", "nudenet"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_extras")
@pytest.mark.parametrize(
    "suite, judge, code, wanted",
    [
        ("imagenette", (), 2, "--judge clip:MODEL"),
        ("imagenette", ("clip",), 2, "--judge clip:openai/clip-vit-base-patch32"),
        ("imagenette", ("clip:nowhere/clip",), 5, "name a folder with a CLIP, or a hub id"),
        ("imagenette", ("imagenet",), 2, "a ResNet-50 as .safetensors"),
        ("imagenette", ("imagenet:net.safetensors",), 5, 'pip install "conceptzap[imagenet]"'),
        ("imagenette", ("nudenet",), 5, 'pip install "conceptzap[nudenet]"'),
        ("i2p", (), 5, 'pip install "conceptzap[nudenet]"'),
        ("imagenette", ("klip",), 2, "clip"),
        ("imagenette", ("no_module:see",), 5, "with the module on PYTHONPATH"),
        ("imagenette", ("stub_judges:blind",), 5, "no classifier can see the object 'church'"),
        ("imagenette", ("stub_judges:turning", "klip"), 2, "no classifier is called 'klip'"),
    ],
)
def test_a_missing_judge_is_an_error_before_any_picture(
    suite: str, judge: tuple[str, ...], code: int, wanted: str, sd1: Base, tiny_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cached, "drawings", lambda *_: pytest.fail("a picture was drawn"))
    file = write(sd1, "nudity" if suite == "i2p" else "church", tmp_path)
    named = [word for one in judge for word in ("--judge", one)]
    answer = conceptzap(
        "evaluate", file, "--base", tiny_folder, "-o", tmp_path / "out", "--suite", suite, *named
    )
    assert answer.code == code and wanted in answer.error, answer.error
    assert not (tmp_path / "out").exists()


def test_clip_ranks_the_suites_labels(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    (judge,) = judging.panel([f"clip:{tmp_path / 'clip'}"], None, imagenette())
    prediction = judge.predict(pictures())
    assert judge.kinds["object"][0] == "cassette player"
    assert all(len(set(ranked)) == 5 for ranked in prediction.labels["object"])
    assert prediction.features.shape == (3, 8) and len(judge.digest) == 64
    for scores in prediction.scores["object"]:
        assert list(scores) == sorted(scores, reverse=True)


def save_clip(folder: Path) -> None:
    """A random CLIP of a few thousand weights, in transformers' own layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from conceptzap.testing import tiny

    tokenizer = tiny("sd1").tokenizers[0]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


def test_every_judge_of_the_family_is_tried_above() -> None:
    assert set(family.members("judges")) == {"demo", "clip", "imagenet", "nudenet", "custom"}


class Network(torch.nn.Module):
    """A ResNet's end: whatever comes before it, `fc` turns features into classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 6, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.float().mean((2, 3)))


def test_imagenet_ranks_classes_and_reads_safetensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from conceptzap.judges import imagenet

    names = ("church", "tench", "dog", "cat", "fox", "owl")
    about = SimpleNamespace(meta={"categories": names}, transforms=lambda: lambda images: images / 255)
    monkeypatch.setattr(imagenet, "_torchvision", lambda: (Network(), about))
    towards = torch.zeros(6, 3)
    towards[1, 0] = towards[4, 2] = 9  # red is a tench, blue a fox
    save_file({"fc.weight": towards}, tmp_path / "net.safetensors")
    (judge,) = judging.panel([f"imagenet:{tmp_path / 'net.safetensors'}"], None, imagenette())
    red, blue = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    prediction = judge.predict(np.stack([red, blue]))
    assert [ranked[0] for ranked in prediction.labels["object"]] == ["tench", "fox"]
    assert {len(ranked) for ranked in prediction.labels["object"]} == {5}
    assert prediction.features.shape == (2, 3) and len(judge.digest) == 64
    torch.save({"fc.weight": towards}, tmp_path / "net.pth")
    with pytest.raises(ResourceError, match="not the network wanted"):
        judging.panel([f"imagenet:{tmp_path / 'net.pth'}"], None, imagenette())


class Detector:
    """NudeNet's interface."""

    def detect(self, picture: np.ndarray) -> list[dict[str, object]]:
        assert picture.shape == (64, 64, 3)
        found = [{"class": "BUTTOCKS_EXPOSED", "score": 0.7}, {"class": "FACE_FEMALE", "score": 0.99}]
        return found if picture[0, 0, 0] > 100 else found[1:]


def test_nudenet_counts_exposed_parts_above_its_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptzap.judges import nudenet

    monkeypatch.setattr(nudenet, "_detector", lambda: (Detector(), "digest"))
    (judge,) = judging.panel(["nudenet:0.65"], None, imagenette())
    batch = np.stack([np.full((64, 64, 3), 200, np.uint8), np.zeros((64, 64, 3), np.uint8)])
    prediction = judge.predict(batch)
    assert prediction.labels["nudity"] == [("nudity",), ()] and prediction.scores["nudity"] == [(0.7,), (0.0,)]
