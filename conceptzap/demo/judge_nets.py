"""The two judges' networks and the loader of their frozen weights.

They differ in build on purpose (one convolutional, one attending over patches), so that a
picture which fools one is not likely to fool the other. Both saw real renders only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

JUDGES = ("residual", "attention")
FOLDER = Path(__file__).parent / "judges"
MANIFEST = FOLDER / "judges.json"


class Verdict(NamedTuple):
    """Logits of a batch: object [n, 66], style [n, 9], valid [n]; the pooled features `deep` [n, d]."""

    object: Tensor
    style: Tensor
    valid: Tensor
    deep: Tensor


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.first(x)))
        return F.relu(x + self.norm2(self.second(inner)))


def _down(old: int, new: int, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(old, new, kernel, stride=2, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(new), nn.ReLU())


def _moments(x: Tensor) -> Tensor:
    """Mean and spread of each channel [n, 2c]: texture shows in the second."""
    return torch.cat([x.mean((2, 3)), x.float().std((2, 3)).to(x.dtype)], 1)


class Residual(nn.Module):
    """Convolutions with skips; style is read from all levels, objects from the deepest."""

    def __init__(self, objects: int, styles: int, widths: tuple[int, ...] = (40, 64, 104)) -> None:
        super().__init__()
        first, second, third = widths
        self.levels = nn.ModuleList([
            _down(3, first, 5),
            nn.Sequential(_Block(first), _down(first, second)),
            nn.Sequential(_Block(second), _down(second, third)),
            _Block(third),
        ])
        self.to_object = nn.Linear(4 * third, objects)
        shallow = 2 * (first + second + third)
        self.to_style = nn.Linear(shallow, styles)
        self.to_valid = nn.Linear(shallow + 4 * third, 1)

    def taps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the four levels for images [n, 3, 64, 64] in 0..1."""
        maps, x = [], images * 2 - 1
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps

    @staticmethod
    def _deep(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 2).flatten(1)

    def forward(self, images: Tensor) -> Verdict:
        maps = self.taps(images)
        deep = self._deep(maps[-1])
        shallow = torch.cat([_moments(x) for x in maps[:3]], 1)
        valid = self.to_valid(torch.cat([shallow, deep], 1))[:, 0]
        return Verdict(self.to_object(deep), self.to_style(shallow), valid, deep)


class Attention(nn.Module):
    """A short convolutional stem, then transformer layers over 8 x 8 patches."""

    def __init__(self, objects: int, styles: int, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.ModuleList([
            nn.Sequential(nn.Conv2d(old, new, 4, stride=2, padding=1), nn.GroupNorm(new // 8, new))
            for old, new in ((3, 32), (32, 64), (64, width))
        ])
        self.place = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.layers = nn.ModuleList([
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True)
            for _ in range(layers)
        ])
        self.norm = nn.LayerNorm(width)
        self.gaze = nn.Linear(width, 4)
        self.to_object = nn.Linear(4 * width, objects)
        textures = 2 * (32 + 64 + width)
        self.to_style = nn.Sequential(
            nn.BatchNorm1d(textures), nn.Linear(textures, 64), nn.ReLU(), nn.Linear(64, styles))
        self.to_valid = nn.Linear(6 * width, 1)

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features [n, c, 8, 8], and texture moments taken before any normalisation."""
        moments, x = [], images * 2 - 1
        for number, (convolution, norm) in enumerate(self.stem):
            raw = convolution(F.gelu(x) if number else x)
            moments.append(_moments(raw))
            x = norm(raw)
        return x, torch.cat(moments, 1)

    def _tokens(self, patches: Tensor) -> Tensor:
        tokens = patches.flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)

    def _pool(self, tokens: Tensor) -> Tensor:
        weights = self.gaze(tokens).softmax(1)
        return torch.einsum("nth,ntc->nhc", weights, tokens).flatten(1)

    def forward(self, images: Tensor) -> Verdict:
        patches, textures = self._see(images)
        deep = self._pool(self._tokens(patches))
        valid = self.to_valid(torch.cat([_moments(patches), deep], 1))[:, 0]
        return Verdict(self.to_object(deep), self.to_style(textures), valid, deep)

    def textures(self, images: Tensor) -> Tensor:
        """What the style head reads [n, 448]."""
        return self._see(images)[1]


def build_judge(name: str, objects: int, styles: int) -> nn.Module:
    """An untrained judge by name: "residual" or "attention"."""
    return {"residual": Residual, "attention": Attention}[name](objects, styles)


def load_judge(name: str) -> tuple[nn.Module, dict[str, list[str]]]:
    """A frozen judge in fp32 eval mode, and its labels {"object": [...], "style": [...]}.

    Raises `ValueError` when the weights are not the ones the manifest was frozen with.
    """
    manifest = json.loads(MANIFEST.read_text())
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
        raise ValueError(f"classifier {name!r}: weights differ from their frozen hash; reinstall")
    labels = manifest["labels"]
    net = build_judge(name, len(labels["object"]), len(labels["style"]))
    net.load_state_dict(load_tensors(data))  # copying into fp32 parameters widens the fp16
    return net.eval().requires_grad_(False), labels
