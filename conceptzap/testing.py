"""Tiny random Stable Diffusions of every family, built in a moment: for tests, ours and yours."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch

from conceptzap.base import Base
from conceptzap.base.bpe import WORD_END, Pair, clip_tokenizer, tokenizer
from conceptzap.base.single_file import PADS

WORDS = """
    a an the of in by with and style photo picture painting drawing sketch cat kitty dog horse
    church house castle tree apple car van gogh monet pencil oil naked person red blue big small two
""".split()
FAMILIES = ("sd1", "sd2", "sdxl")
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
SIDE = 8  # latents are 8 x 8, pictures 16 x 16


def tiny(
    family: str = "sd1",
    prediction: str | None = None,
    seed: int = 0,
    clip: bool = False,
    channels: int = 4,
) -> Base:
    """A random base on the CPU: 2 UNet levels with 4 cross-attentions or more, 16 px pictures.

    `sd1` predicts noise; `sd2` v, with linear projections and another padding token; `sdxl` has two
    text encoders, pooled text and size ids. It knows `WORDS`, or with `clip` CLIP's whole
    vocabulary. `channels`: what the UNet reads: 9 for inpainting, 8 for pix2pix, 5 for depth. Same
    arguments, same weights.
    """
    merges = _merges(tuple(WORDS))
    tokenizers = tuple(
        clip_tokenizer(pad) if clip else tokenizer(merges, pad) for pad in PADS[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = _text_encoders(family, tokenizers[0])
        width = sum(encoder.config.hidden_size for encoder in encoders)
        unet = _unet(family, width, encoders[-1].config.projection_dim, channels)
        vae = _vae()
    return Base(
        unet=unet,
        text_encoders=encoders,
        tokenizers=tokenizers,
        vae=vae,
        scheduler_config={
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": prediction or PREDICTION[family],
        },
        prediction=prediction or PREDICTION[family],
        family=family,
        id=f"tiny-{family}",
        revision="",
        device=torch.device("cpu"),
        dtype=torch.float32,
        zero_negative=family == "sdxl",
    ).frozen()


def save_tiny(
    folder: Path, family: str = "sd1", prediction: str | None = None, seed: int = 0
) -> Path:
    """`tiny` written to `folder` as diffusers writes a pipeline; returns the folder."""
    tiny(family, prediction, seed).pipeline().save_pretrained(str(folder), safe_serialization=True)
    return Path(folder)


@cache
def _merges(words: tuple[str, ...]) -> tuple[Pair, ...]:
    """Byte-pair merges until every word is one token (Sennrich et al. 2016)."""
    parts = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[Pair] = []
    while pairs := Counter(pair for word in parts for pair in zip(word, word[1:], strict=False)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        parts = [_merged(word, best) for word in parts]
    return tuple(merges)


def _merged(word: list[str], pair: Pair) -> list[str]:
    result: list[str] = []
    for part in word:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def _text_encoders(family: str, words: Any) -> tuple[Any, ...]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if family == "sdxl":
        return (
            CLIPTextModel(_text_config(24, "quick_gelu", words)),
            CLIPTextModelWithProjection(_text_config(40, "gelu", words)),
        )
    shape = (32, "quick_gelu") if family == "sd1" else (40, "gelu")
    return (CLIPTextModel(_text_config(*shape, words)),)


def _text_config(width: int, activation: str, words: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def _unet(family: str, width: int, pooled: int, channels: int) -> Any:
    from diffusers import UNet2DConditionModel

    plain = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "use_linear_projection": family == "sd2",
    }
    large = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled + 6 * 8,
    }
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=width,
        **(large if family == "sdxl" else plain),
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * SIDE,
    )
