"""Train the demo's VAE: 64 px pictures to latents of 4 x 16 x 16.

Pixel losses alone blur away the textures that make the styles, so a perceptual term stands
beside them: the L1 distance between four levels of features of a network of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from conceptzap.demo.judge_nets import Residual
from conceptzap.demo.recipe.train_judges import Renders
from conceptzap.demo.recipe.training import Recipe, fit

BATCH = 16
_PERCEPTUAL, _SQUARED, _KL = 0.15, 0.5, 5e-4


def build_vae() -> AutoencoderKL:
    """The untrained VAE: factor 4, three levels of one layer, no attention, 1.6 M weights."""
    torch.manual_seed(11)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=64,
        block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)


def train_vae(
    vae: AutoencoderKL, eye: Residual, renders: Renders, recipe: Recipe, folder: Path,
    device: torch.device,
) -> nn.Module:
    """Fit the VAE with L1 + squared + perceptual + KL; `eye` is the frozen perceptual network."""
    eye.to(device).eval().requires_grad_(False)

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([recipe.seed, step])
        pictures = renders.batch(rng.choice(len(renders.pictures), BATCH, replace=False), device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pictures * 2 - 1).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample.float() / 2 + 0.5
            seen = perceptual(eye, rebuilt, pictures)
        mean, spread = posterior.mean.float(), posterior.logvar.float()
        terms = {
            "l1": F.l1_loss(rebuilt, pictures), "mse": F.mse_loss(rebuilt, pictures),
            "perceptual": seen, "kl": 0.5 * (mean**2 + spread.exp() - 1 - spread).mean()}
        total = (2 * terms["l1"] + 4 * _SQUARED * terms["mse"]
                 + _PERCEPTUAL * terms["perceptual"] + _KL * terms["kl"])
        return terms | {"total": total}

    return fit(vae.to(device), loss, recipe, folder)


def perceptual(eye: Residual, ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over levels of the L1 distance between features, relative to the features' size."""
    with torch.no_grad():
        targets = eye.taps(theirs)
    distances = [
        (a - b).abs().float().mean() / (b.abs().float().mean() + 1e-3)
        for a, b in zip(eye.taps(ours), targets, strict=True)]
    return torch.stack(distances).mean()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, renders: Renders, device: torch.device) -> np.ndarray:
    """Posterior means of all pictures, float32 [n, 4, 16, 16], not scaled."""
    parts = []
    for index in np.array_split(np.arange(len(renders.pictures)), len(renders.pictures) // 64):
        pictures = renders.batch(index, device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(pictures * 2 - 1).latent_dist.mean
        parts.append(latents.float().cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures [n, 3, 64, 64] in 0..1 through the VAE and back."""
    latents = vae.encode(pictures * 2 - 1).latent_dist.mean
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
