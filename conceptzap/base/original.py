"""Checkpoints in the names of the original Stable Diffusion code, as one file holds them.

The inverse of diffusers' `convert_ldm_unet_checkpoint`, `convert_ldm_vae_checkpoint`,
`convert_ldm_clip_checkpoint` and `convert_open_clip_checkpoint`, by which such files are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.base.identity import parameters

Rules = Iterable[tuple[str, str]]
UNET_PREFIX = "model.diffusion_model."

RESNET: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
UNET: Rules = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
)
BLOCK = re.compile(
    r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\.conv)?"
)
VAE: Rules = (
    (r"down_blocks\.", "down."),
    (r"(up|down)\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"(up|down)samplers\.0\.conv", r"\1sample.conv"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
OPEN_CLIP: Rules = (
    (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^final_layer_norm\.", "ln_final."),
)
# where a family's text encoders stand, and which of them are named as OpenCLIP names its own
TEXT = {
    "sd1": (("cond_stage_model.transformer.text_model.", False),),
    "sd2": (("cond_stage_model.model.", True),),
    "sdxl": (
        ("conditioner.embedders.0.transformer.text_model.", False),
        ("conditioner.embedders.1.model.", True),
    ),
}


def tensors(unet: Any, vae: Any, encoders: Iterable[Any], family: str) -> dict[str, Tensor]:
    """All weights of a checkpoint by their original names; those that stay whole are not copied."""
    names = unet_names(unet)
    found = {f"{UNET_PREFIX}{names[name]}": value for name, value in parameters(unet)}
    found |= {f"first_stage_model.{name}": value for name, value in _vae(vae).items()}
    for encoder, (prefix, open_clip) in zip(encoders, TEXT[family], strict=True):
        named = _open_clip(encoder) if open_clip else dict(parameters(encoder))
        found |= {prefix + name: value for name, value in named.items()}
    return found


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_names(unet: Any) -> dict[str, str]:
    """Parameter of a UNet -> its original name, without `model.diffusion_model.`.

    The blocks stand in one row there: a level's layers, then its change of size.
    """
    stride = unet.config.layers_per_block + 1
    attending = {name.split(".")[1] for name, _ in unet.named_modules() if re.match(r"up.*attentions", name)}

    def block(match: re.Match[str]) -> str:
        way, number, kind, inner = match[1], int(match[2]), match[3], int(match[4])
        column = 0 if kind == "resnets" else 1
        if kind == "downsamplers":
            return f"input_blocks.{(number + 1) * stride}.0.op"
        if kind == "upsamplers":  # behind the attention, where the last layer of the level has one
            return f"output_blocks.{(number + 1) * stride - 1}.{1 + (match[2] in attending)}.conv"
        if way == "down":
            return f"input_blocks.{1 + number * stride + inner}.{column}"
        return f"output_blocks.{number * stride + inner}.{column}"

    def name_of(name: str) -> str:
        inside = _rename(name, RESNET) if ".resnets." in name else name
        return _rename(BLOCK.sub(block, inside), UNET)

    return {name: name_of(name) for name, _ in parameters(unet)}


def _vae(vae: nn.Module) -> dict[str, Tensor]:
    top = len(vae.config.block_out_channels) - 1

    def name_of(name: str) -> str:  # the decoder's levels are counted from the picture there
        return _rename(re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{top - int(m[1])}", name), VAE)

    def shaped(name: str, value: Tensor) -> Tensor:  # the original attends by 1 x 1 convolutions
        linear = re.search(r"attentions\.0\.to_.*weight$", name)
        return value[:, :, None, None] if linear else value

    return {name_of(name): shaped(name, value) for name, value in parameters(vae)}


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    """q, k and v are one matrix there, and every encoder has a projection of its pooled text."""
    values = dict(parameters(encoder))
    some = next(iter(values.values()))
    identity = torch.eye(encoder.config.hidden_size, dtype=some.dtype, device=some.device)
    found = {"text_projection": values.pop("text_projection.weight", identity).T}
    for layer in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            names = [f"encoder.layers.{layer}.self_attn.{q}_proj.{kind}" for q in "qkv"]
            joined = torch.cat([values.pop(name) for name in names])  # [3 d, d] or [3 d]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    return found | {_rename(name, OPEN_CLIP): value for name, value in values.items()}
