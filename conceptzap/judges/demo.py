"""The two frozen judges of the demo world: objects, styles, and whether it is a picture at all."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conceptzap.demo import judge_nets
from conceptzap.demo import world as demo
from conceptzap.errors import ResourceError, UsageError
from conceptzap.evaluation.comparison import Prediction
from conceptzap.evaluation.probes import OBJECT, STYLE, Subject, World

RANKS = 5
SIZE = 64  # pixels the networks were trained on
ORACLE = judge_nets.FOLDER.parent / "oracle.json"


class DemoJudge:
    """One of the two networks. `kinds`: kind -> labels; `predict` takes uint8 pictures [n, h, w, 3]."""

    def __init__(self, name: str) -> None:
        self.name = f"demo/{name}"
        try:
            self.net, labels = judge_nets.load_judge(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise ResourceError(f"the demo classifier {name!r} cannot be loaded: {error}",
                                "reinstall conceptzap") from error
        self.kinds = {kind: tuple(names) for kind, names in labels.items()}
        data = (judge_nets.FOLDER / f"{name}.safetensors").read_bytes()
        self.digest = hashlib.sha256(data).hexdigest()

    @torch.no_grad()
    def predict(self, pictures: Tensor | np.ndarray) -> Prediction:
        images = as_input(pictures)
        verdict = self.net(images)
        logits = {OBJECT: verdict.object, STYLE: verdict.style}
        top = {kind: logits[kind].softmax(-1).topk(RANKS) for kind in logits}
        labels = {
            kind: [tuple(self.kinds[kind][i] for i in row) for row in found.indices.tolist()]
            for kind, found in top.items()
        }
        scores = {kind: [tuple(row) for row in found.values.tolist()] for kind, found in top.items()}
        return Prediction(labels, scores, (verdict.valid > 0).numpy(), verdict.deep.numpy())


def as_input(pictures: Tensor | np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] as floats [n, 3, 64, 64] in 0..1; larger pictures are averaged down."""
    images = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return torch.nn.functional.interpolate(images, (SIZE, SIZE), mode="area")


def load(base: Any = None, option: str = "", world: World | None = None) -> tuple[DemoJudge, ...]:
    """Both judges. They know the demo's world and take no option."""
    if option:
        raise UsageError(f"the demo classifiers take no option, not {option!r}", "use --judge demo")
    return tuple(DemoJudge(name) for name in judge_nets.JUDGES)


def fits(base: Any) -> bool:
    """Whether a base draws this world for certain: the built-in checkpoint does."""
    return base.is_demo


def oracle(suite: str, concept: str, base: str) -> dict[str, Any]:
    """Scores of this world's checkpoint trained without a concept, against the base of that digest.

    {} where that was not measured. Written by `tests/benchmarks/evaluate_oracle.py`.
    """
    if not ORACLE.is_file():
        return {}
    measured = json.loads(ORACLE.read_text(encoding="utf-8"))
    return measured["scores"].get(f"{suite}/{concept}", {}) if measured["base"] == base else {}


def world() -> World:
    """The demo's objects, styles, captions and split."""
    objects = (
        Subject(thing.name, OBJECT, (thing.name, *thing.synonyms), thing.held_out_synonyms)
        for thing in demo.OBJECTS
    )
    styles = (Subject(s.name, STYLE, (s.name,), (), s.bare) for s in demo.STYLES)
    templates = {s.name: (s.templates, s.held_out_templates) for s in demo.STYLES}
    return World((*objects, *styles), templates, demo.STYLES[0].name, demo.SPLIT)
