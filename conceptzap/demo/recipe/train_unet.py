"""Train the UNet and the text encoder together on cached latents and generated captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conceptzap.demo.recipe.render import Item
from conceptzap.demo.recipe.tokenizer import LENGTH, build_tokenizer
from conceptzap.demo.recipe.training import Recipe, fit
from conceptzap.demo.world import (
    OBJECTS,
    STYLES,
    fill,
    find_object,
    find_style,
    pair_caption,
    templates,
)

BATCH = 48
WIDTH = 160
_EMPTY, _BARE, _SYNONYM = 0.10, 0.03, 0.35
_SNR_CAP, _AUXILIARY = 5.0, 0.02
_IGNORED = -100


class Painter(nn.Module):
    """UNet and text encoder under one roof, with two small heads used in training only."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 192),
            layers_per_block=1, norm_num_groups=16, cross_attention_dim=WIDTH,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
        # Plain attention trains a quarter faster than the fused kernel at this size on a CPU.
        self.unet.set_attn_processor(AttnProcessor())
        self.text = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=LENGTH,
            projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
        self.name_object = nn.Linear(WIDTH, len(OBJECTS))
        self.name_style = nn.Linear(WIDTH, len(STYLES))


def build_painter() -> tuple[Painter, CLIPTokenizer]:
    """The untrained model, 10.9 M weights in the UNet, and its tokenizer."""
    torch.manual_seed(21)
    tokenizer = build_tokenizer()
    return Painter(tokenizer), tokenizer


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="epsilon")


class Captions:
    """Random captions of pictures as token ids, and what they name."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._object = {thing.name: number for number, thing in enumerate(OBJECTS)}
        self._style = {style.name: number for number, style in enumerate(STYLES)}

    def draw(self, items: list[Item], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [n, 77], object labels [n] and style labels [n], -100 where not named."""
        rows, objects, styles = [], [], []
        for item in items:
            text, has_object, has_style = self._write(item, rng)
            rows.append(self._ids(text))
            single = has_object and not item.right
            objects.append(self._object[item.object] if single else _IGNORED)
            styles.append(self._style[item.style] if has_style else _IGNORED)
        return torch.tensor(rows), torch.tensor(objects), torch.tensor(styles)

    def _write(self, item: Item, rng: np.random.Generator) -> tuple[str, bool, bool]:
        chance = rng.random()
        if chance < _EMPTY:
            return "", False, False
        style = find_style(item.style)
        if chance < _EMPTY + _BARE:
            return style.bare[int(rng.integers(len(style.bare)))], False, True
        if item.right:
            number = int(rng.integers(100))
            left, right = _word(item.object, rng), _word(item.right, rng)
            return pair_caption(left, right, style, number), True, True
        choices = (*templates(style), *templates(style, held_out=True))
        template = choices[int(rng.integers(len(choices)))]
        return fill(template, _word(item.object, rng)), True, True

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(
                text, padding="max_length", max_length=LENGTH, truncation=True).input_ids
        return self._known[text]


def _word(name: str, rng: np.random.Generator) -> str:
    words = find_object(name).words
    if len(words) > 1 and rng.random() < _SYNONYM:
        return words[1 + int(rng.integers(len(words) - 1))]
    return name


def draw_timesteps(count: int, rng: np.random.Generator) -> Tensor:
    """Two thirds from a logit-normal about the middle, one third uniform, in 0..999."""
    middle = 1 / (1 + np.exp(-rng.normal(0.2, 1.0, count)))
    share = np.where(rng.random(count) < 2 / 3, middle, rng.random(count))
    return torch.from_numpy(np.minimum((share * 1000).astype(np.int64), 999))


def train_unet(
    painter: Painter, tokenizer: CLIPTokenizer, items: list[Item], latents: np.ndarray,
    recipe: Recipe, folder: Path, device: torch.device,
) -> nn.Module:
    """Fit noise prediction with min-SNR weights (Hang et al. 2023) on scaled latents.

    The heads' loss teaches the text encoder early which words matter; it is soon solved.
    """
    captions = Captions(tokenizer)
    kept = build_scheduler().alphas_cumprod.to(device)

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([recipe.seed, step])
        index = rng.choice(len(items), BATCH, replace=False)
        ids, objects, styles = captions.draw([items[i] for i in index], rng)
        clean = torch.from_numpy(latents[index]).to(device)
        times = draw_timesteps(BATCH, rng).to(device)
        signal = kept[times].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16):
            words = painter.text(ids.to(device))
            guess = painter.unet(noisy, times, words.last_hidden_state).sample
            heads = (painter.name_object(words.pooler_output),
                     painter.name_style(words.pooler_output))
        ratio = (signal / (1 - signal)).flatten()
        weight = ratio.clamp(max=_SNR_CAP) / ratio
        each = (guess.float() - noise).square().mean((1, 2, 3))
        naming = _naming_loss(heads, (objects.to(device), styles.to(device)))
        denoise = (weight * each).mean()
        return {"denoise": denoise, "naming": naming, "total": denoise + _AUXILIARY * naming}

    return fit(painter.to(device), loss, recipe, folder)


def _naming_loss(heads: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Tensor:
    losses = [F.cross_entropy(logits.float(), truth, ignore_index=_IGNORED, reduction="sum")
              / (truth != _IGNORED).sum().clamp(min=1)
              for logits, truth in zip(heads, labels, strict=True)]
    return torch.stack(losses).sum()


def without(items: list[Item], concept: str) -> np.ndarray:
    """Indices of the items that show nothing of a concept; of all, where none is named."""
    return np.array([number for number, item in enumerate(items)
                     if not concept or concept not in (item.object, item.right, item.style)])
