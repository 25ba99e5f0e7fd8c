"""Zero-shot CLIP over the suite's labels: any local folder or hub id that transformers can load."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conceptzap.edit import tensor_bytes
from conceptzap.errors import ResourceError, UsageError
from conceptzap.evaluation.comparison import Prediction
from conceptzap.evaluation.probes import SCENE, STYLE, World

RANKS = 5
CAPTION = {STYLE: "a picture in the style of {}"}
PLAIN = "a photo of a {}"


class ClipJudge:
    """Ranks a suite's labels by the cosine of picture and caption, one kind at a time."""

    def __init__(self, option: str, world: World) -> None:
        self.name = f"clip:{option}"
        self.model, self.processor = _read(option)
        self.kinds: dict[str, tuple[str, ...]] = {}
        for subject in world.subjects:
            if subject.kind != SCENE:
                self.kinds[subject.kind] = (*self.kinds.get(subject.kind, ()), subject.name)
        self.texts = {kind: self._embed(kind, labels) for kind, labels in self.kinds.items()}
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor_bytes(value))
        self.digest = digest.hexdigest()

    @torch.no_grad()
    def _embed(self, kind: str, labels: tuple[str, ...]) -> Tensor:
        captions = [CAPTION.get(kind, PLAIN).format(label) for label in labels]
        inputs = self.processor(text=captions, return_tensors="pt", padding=True, truncation=True)
        return _unit(self.model.get_text_features(**inputs))

    @torch.no_grad()
    def predict(self, pictures: Any) -> Prediction:
        images = [Image.fromarray(picture) for picture in np.asarray(pictures)]
        inputs = self.processor(images=images, return_tensors="pt")
        features = _unit(self.model.get_image_features(**inputs))
        labels, scores = {}, {}
        for kind, texts in self.texts.items():
            likely = (features @ texts.T * self.model.logit_scale.exp()).softmax(-1)
            top = likely.topk(min(RANKS, likely.shape[1]))
            names = self.kinds[kind]
            labels[kind] = [tuple(names[i] for i in row) for row in top.indices.tolist()]
            scores[kind] = [tuple(row) for row in top.values.tolist()]
        return Prediction(labels, scores, np.ones(len(images), bool), features.numpy())


def _unit(output: Any) -> Tensor:
    # transformers 5 wraps what earlier versions returned as it is
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _read(option: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(option, use_safetensors=True)
        return model.eval().requires_grad_(False), CLIPProcessor.from_pretrained(option)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"no CLIP at {option!r}: {reason}", "name a folder with a CLIP, or a hub id you can reach"
        ) from error


def load(base: Any, option: str, world: World | None = None) -> tuple[ClipJudge, ...]:
    """One judge; `option` is the model. Its labels are the world's."""
    if not option:
        raise UsageError(
            "the clip classifier needs a model", "for example --judge clip:openai/clip-vit-base-patch32"
        )
    if world is None:
        raise UsageError("the clip classifier needs labels to choose from", "use it with a suite")
    return (ClipJudge(option, world),)
