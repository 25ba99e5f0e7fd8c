"""Train the judges, and the network whose features measure perceptual distance for the VAE.

The perceptual network is of its own seed and widths and is never a judge: a VAE trained against a
judge would learn to please it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from conceptzap.demo import judge_nets
from conceptzap.demo.recipe.render import PLACEMENTS, Item
from conceptzap.demo.recipe.training import Recipe, fit
from conceptzap.demo.world import OBJECTS, STYLES

HELD_OUT_PLACEMENT = PLACEMENTS - 1
_IGNORED = -100
_BATCH = 64
_BROKEN = 10
PERCEPTUAL_WIDTHS = (32, 56, 88)


@dataclass(frozen=True)
class Renders:
    """All pictures with their labels; an object label of -100 means two objects."""

    pictures: np.ndarray
    objects: Tensor
    styles: Tensor
    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, items: list[Item], pictures: np.ndarray) -> Renders:
        names = {thing.name: index for index, thing in enumerate(OBJECTS)}
        looks = {style.name: index for index, style in enumerate(STYLES)}
        objects = [_IGNORED if item.right else names[item.object] for item in items]
        away = np.array([item.placement == HELD_OUT_PLACEMENT for item in items])
        single = np.array([not item.right for item in items])
        return cls(pictures, torch.tensor(objects), torch.tensor([looks[i.style] for i in items]),
                   np.flatnonzero(~away), np.flatnonzero(away & single))

    def batch(self, index: np.ndarray, device: torch.device) -> Tensor:
        """Pictures [n, 3, 64, 64] in 0..1."""
        pixels = torch.from_numpy(self.pictures[index]).to(device)
        return pixels.permute(0, 3, 1, 2).float() / 255


def train_classifier(
    net: nn.Module, renders: Renders, recipe: Recipe, folder: Path, device: torch.device
) -> nn.Module:
    """Fit object, style and valid heads on augmented renders and on broken pictures."""

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([recipe.seed, step])
        index = rng.choice(renders.train, _BATCH, replace=False)
        real = augment(renders.batch(index, device))
        pictures = torch.cat([real, broken(renders.batch(index[:_BROKEN], device), step)])
        with torch.autocast(device.type, torch.bfloat16):
            verdict = net(pictures)
        objects = renders.objects[index].to(device)
        styles = renders.styles[index].to(device)
        truth = (torch.arange(len(pictures), device=device) < _BATCH).float()
        terms = {
            "object": F.cross_entropy(verdict.object[:_BATCH].float(), objects,
                                      label_smoothing=0.05, ignore_index=_IGNORED),
            "style": F.cross_entropy(verdict.style[:_BATCH].float(), styles, label_smoothing=0.05),
            "valid": F.binary_cross_entropy_with_logits(verdict.valid.float(), truth),
        }
        return terms | {"total": terms["object"] + 0.5 * terms["style"] + 0.3 * terms["valid"]}

    return fit(net.to(device), loss, recipe, folder)


def refit_style(
    net: judge_nets.Attention, renders: Renders, recipe: Recipe, folder: Path,
    device: torch.device,
) -> None:
    """Fit the style head of the attention judge again, everything else frozen.

    Heavy softness and noise make a photo pass for a Monet, so this head sees a quarter of them.
    """
    net.to(device).eval()

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([recipe.seed, step])
        index = rng.choice(renders.train, _BATCH, replace=False)
        with torch.no_grad():
            textures = net.textures(augment(renders.batch(index, device), harm=0.25))
        styles = renders.styles[index].to(device)
        return {"total": F.cross_entropy(net.to_style(textures), styles, label_smoothing=0.05)}

    fit(net.to_style, loss, recipe, folder)


def augment(pictures: Tensor, harm: float = 1.0) -> Tensor:
    """Small shifts, turns and scales; contrast, softness and noise in proportion to `harm`."""
    count, device = len(pictures), pictures.device
    turn = (torch.rand(count, device=device) - 0.5) * 0.24
    scale = 1 + (torch.rand(count, device=device) - 0.5) * 0.2
    shift = (torch.rand(count, 2, device=device) - 0.5) * 0.16
    cosine, sine = torch.cos(turn) * scale, torch.sin(turn) * scale
    rows = [torch.stack([cosine, -sine, shift[:, 0]], 1),
            torch.stack([sine, cosine, shift[:, 1]], 1)]
    moved = torch.rand(count, device=device) < 0.7
    still = torch.eye(2, 3, device=device).expand(count, 2, 3)
    matrix = torch.where(moved[:, None, None], torch.stack(rows, 1), still)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    contrast = 1 + (torch.rand(count, 1, 1, 1, device=device) - 0.5) * 0.3 * harm
    pictures = (pictures - 0.5) * contrast + 0.5
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(count, 1, 1, 1, device=device) * 0.9 * harm
    blend = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.3, amount, 0)
    noise = torch.randn_like(pictures) * torch.rand(count, 1, 1, 1, device=device) * 0.06 * harm
    return (torch.lerp(pictures, soft, blend) + noise).clamp(0, 1)


def broken(pictures: Tensor, step: int) -> Tensor:
    """What is no picture: noise, heavy blur, flat colour, shuffled patches, strong noise on top."""
    kind = step % 5
    if kind == 0:
        return torch.rand_like(pictures)
    if kind == 1:
        small = F.adaptive_avg_pool2d(pictures, 4)
        return F.interpolate(small, size=pictures.shape[-1], mode="bilinear")
    if kind == 2:
        flat = torch.rand(len(pictures), 3, 1, 1, device=pictures.device).expand_as(pictures)
        grey = flat.mean(1, keepdim=True).expand_as(pictures)
        return torch.where(torch.rand(1, device=pictures.device) < 0.5, flat, grey)
    if kind == 3:
        return shuffle_patches(pictures, 8 if step % 2 else 16)
    return (pictures + 0.45 * torch.randn_like(pictures)).clamp(0, 1)


def shuffle_patches(pictures: Tensor, side: int) -> Tensor:
    """The same pixels with their square patches in another order."""
    patches = F.unfold(pictures, side, stride=side)
    order = torch.randperm(patches.shape[-1], device=pictures.device)
    return F.fold(patches[..., order], pictures.shape[-2:], side, stride=side)


def perceptual_net() -> judge_nets.Residual:
    """The untrained network whose feature maps the VAE is trained against."""
    torch.manual_seed(77)
    return judge_nets.Residual(len(OBJECTS), len(STYLES), PERCEPTUAL_WIDTHS)


@torch.no_grad()
def accuracy(net: nn.Module, renders: Renders, device: torch.device) -> dict[str, float]:
    """Shares right on held-out renders, whole and per style, and of broken pictures caught."""
    right_object, right_style, valid = [], [], []
    for index in np.array_split(renders.held_out, 20):
        verdict = net(renders.batch(index, device))
        right_object.append((verdict.object.argmax(1).cpu() == renders.objects[index]).float())
        right_style.append((verdict.style.argmax(1).cpu() == renders.styles[index]).float())
        valid.append((verdict.valid > 0).float().cpu())
    objects, styles = torch.cat(right_object), torch.cat(right_style)
    torch.manual_seed(0)
    probe = renders.batch(renders.held_out[:200], device)
    caught = torch.cat([net(broken(probe, kind)).valid < 0 for kind in range(5)]).float().mean()
    report = {"object": objects.mean(), "style": styles.mean(), "valid": torch.cat(valid).mean(),
              "broken": caught}
    for number, style in enumerate(STYLES):
        chosen = renders.styles[renders.held_out] == number
        report[f"object, {style.name}"] = objects[chosen].mean()
        report[f"style, {style.name}"] = styles[chosen].mean()
    return {name: round(float(value), 4) for name, value in report.items()}


def _narrow(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous().cpu()


def freeze(nets: dict[str, nn.Module], scores: dict[str, dict[str, float]], folder: Path) -> None:
    """Write the judges' weights (fp16) and the manifest with their hashes and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, net in nets.items():
        path = folder / f"{name}.safetensors"
        save_file({key: _narrow(value) for key, value in net.state_dict().items()}, path)
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    labels = {"object": [o.name for o in OBJECTS], "style": [s.name for s in STYLES]}
    manifest = {"labels": labels, "sha256": hashes, "held_out_renders": scores}
    (folder / judge_nets.MANIFEST.name).write_text(json.dumps(manifest, indent=1) + "\n")
