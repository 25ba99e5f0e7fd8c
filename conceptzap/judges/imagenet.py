"""ResNet-50 over the 1000 ImageNet classes (torchvision, extra `imagenet`), as ESR and PSR are printed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conceptzap.errors import ResourceError, UsageError
from conceptzap.evaluation.comparison import Prediction
from conceptzap.evaluation.probes import OBJECT, World

RANKS = 5
WANTED = "a ResNet-50 as .safetensors with torchvision's names, e.g. --judge imagenet:resnet50.safetensors"


class ImagenetJudge:
    """Ranks ImageNet's classes; `kinds["object"]` are their names."""

    def __init__(self, path: Path) -> None:
        network, about = _torchvision()
        self.name, self.transform = f"imagenet:{path.name}", about.transforms()
        self.kinds = {OBJECT: tuple(about.meta["categories"])}
        self.net, self.digest = _weights(network, path)
        self.features: list[torch.Tensor] = []
        self.net.fc.register_forward_pre_hook(lambda _, args: self.features.append(args[0]))

    @torch.no_grad()
    def predict(self, pictures: Any) -> Prediction:
        images = torch.as_tensor(np.array(pictures)).permute(0, 3, 1, 2)
        self.features.clear()
        likely = self.net(self.transform(images)).softmax(-1)
        top = likely.topk(RANKS)
        names = self.kinds[OBJECT]
        labels = [tuple(names[i] for i in row) for row in top.indices.tolist()]
        scores = [tuple(row) for row in top.values.tolist()]
        features = torch.cat(self.features).numpy()
        return Prediction({OBJECT: labels}, {OBJECT: scores}, np.ones(len(images), bool), features)


def _torchvision() -> tuple[Any, Any]:
    try:
        from torchvision.models import ResNet50_Weights, resnet50
    except (ImportError, RuntimeError) as error:
        raise ResourceError(
            f"the imagenet classifier needs torchvision: {error}", 'pip install "conceptzap[imagenet]"'
        ) from error
    return resnet50(weights=None), ResNet50_Weights.DEFAULT


def _weights(network: Any, path: Path) -> tuple[Any, str]:
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        network.load_state_dict(load(data))
    except Exception as error:  # safetensors and torch raise types of their own
        raise ResourceError(f"{path} is not the network wanted: {error}", WANTED) from error
    return network.eval().requires_grad_(False), hashlib.sha256(data).hexdigest()


def load(base: Any, option: str, world: World | None = None) -> tuple[ImagenetJudge, ...]:
    """One judge; `option` is the file of its weights, never a pickle and never downloaded."""
    if not option:
        raise UsageError("the imagenet classifier needs its weights", f"give {WANTED}")
    return (ImagenetJudge(Path(option)),)
