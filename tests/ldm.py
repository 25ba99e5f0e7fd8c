"""Write a base in one file as the original Stable Diffusion code names its tensors: for tests."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptzap.base import Base, parameters

Rules = list[tuple[str, str]]

RESNET: Rules = [
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
UNET: Rules = [
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
]
VAE: Rules = [
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]
OPEN_CLIP: Rules = [
    (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^final_layer_norm\.", "ln_final."),
]


def write(base: Base, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """The whole of `base` at `path`, fp16, in the layout of its family's original code."""
    tensors = {f"model.diffusion_model.{name}": v for name, v in _unet(base.unet).items()}
    tensors |= {f"first_stage_model.{name}": v for name, v in _vae(base.vae).items()}
    tensors |= _text(base)
    save_file(
        {name: v.detach().half().contiguous().clone() for name, v in tensors.items()},
        path,
        metadata,
    )
    return path


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unet(unet: nn.Module) -> dict[str, Tensor]:
    stride = unet.config.layers_per_block + 1
    attending = [
        name for name, _ in unet.named_modules() if re.fullmatch(r"up.*attentions\.\d+", name)
    ]

    def block(match: re.Match[str]) -> str:
        way, number, kind, inner = match[1], int(match[2]), match[3], int(match[4])
        if way == "down":
            last = f"input_blocks.{(number + 1) * stride}.0.op"
            column = 0 if kind == "resnets" else 1
            at = f"input_blocks.{1 + number * stride + inner}.{column}"
            return last if kind == "downsamplers" else at
        if kind == "upsamplers":
            after = any(name.startswith(f"up_blocks.{number}.") for name in attending)
            return f"output_blocks.{number * stride + stride - 1}.{1 + after}.conv"
        return f"output_blocks.{number * stride + inner}.{0 if kind == 'resnets' else 1}"

    def name_of(name: str) -> str:
        name = _rename(name, RESNET) if ".resnets." in name else name
        kinds = "resnets|attentions|downsamplers|upsamplers"
        place = rf"^(down|up)_blocks\.(\d+)\.({kinds})\.(\d+)(\.conv)?"
        return _rename(re.sub(place, block, name), UNET)

    return {name_of(name): value for name, value in parameters(unet)}


def _vae(vae: nn.Module) -> dict[str, Tensor]:
    top = len(vae.config.block_out_channels) - 1

    def name_of(name: str) -> str:
        name = re.sub(
            r"up_blocks\.(\d+)",
            lambda m: f"up.{top - int(m[1])}",
            re.sub(r"down_blocks", "down", name),
        )
        name = re.sub(r"(up|down)\.(\d+)\.resnets\.", r"\1.\2.block.", name)
        name = re.sub(r"(up|down)samplers\.0\.conv", r"\1sample.conv", name)
        return _rename(name, VAE)

    def shaped(name: str, value: Tensor) -> Tensor:
        linear = re.search(r"attentions\.0\.to_.*weight$", name)
        return (
            value[:, :, None, None] if linear else value
        )  # the original attends by 1 x 1 convolutions

    return {name_of(name): shaped(name, value) for name, value in parameters(vae)}


def _text(base: Base) -> dict[str, Tensor]:
    if base.family == "sd2":
        return _open_clip(base.text_encoders[0], "cond_stage_model.model.")
    first = dict(parameters(base.text_encoders[0]))
    if base.family == "sd1":
        return {f"cond_stage_model.transformer.text_model.{name}": v for name, v in first.items()}
    prefix = "conditioner.embedders.0.transformer.text_model."
    return {prefix + name: value for name, value in first.items()} | _open_clip(
        base.text_encoders[1], "conditioner.embedders.1.model."
    )


def _open_clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    values = dict(parameters(encoder))
    width = encoder.config.hidden_size
    result = {"text_projection": values.pop("text_projection.weight", torch.eye(width)).T}
    for layer in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            names = [f"encoder.layers.{layer}.self_attn.{q}_proj.{kind}" for q in "qkv"]
            joined = torch.cat([values.pop(name) for name in names])
            result[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    result |= {_rename(name, OPEN_CLIP): value for name, value in values.items()}
    return {prefix + name: value for name, value in result.items()}
