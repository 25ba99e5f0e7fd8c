"""ComfyUI as these tests need it where no engine is installed: a stand-in, not the program.

`UNet` is a UNet of the original Stable Diffusion code; `ModelPatcher` keeps ComfyUI's semantics: clones share
the model and copy the options, a wrapper stands in for UNet calls, conditional and unconditional rows come in
one batch that `cond_or_uncond` describes (unconditional first), cross-attention can be replaced by block.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    def __init__(self, into: int, out: int, emb: int) -> None:
        super().__init__()
        norms = nn.GroupNorm(32, into), nn.GroupNorm(32, out)
        self.in_layers = nn.Sequential(norms[0], nn.SiLU(), nn.Conv2d(into, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out))
        self.out_layers = nn.Sequential(norms[1], nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in "kv")
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, x: Any, context: Any = None, value: Any = None, mask: Any = None) -> Tensor:
        context = x if context is None else context
        parts = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        bias = None if mask is None else mask[:, None]
        found = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        return self.to_out(found)


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class Block(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = (CrossAttention(width, into, heads) for into in (width, context))
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(Gated(width), nn.Identity(), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        n, replaced = self.norm2(x), options.get("patches_replace", {}).get("attn2", {})
        if options["block"] in replaced:
            q, k, v = self.attn2.to_q(n), self.attn2.to_k(context), self.attn2.to_v(context)
            x = x + self.attn2.to_out(replaced[options["block"]](q, k, v, options))
        else:
            x = x + self.attn2(n, context=context, value=None)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = (nn.Conv2d(width, width, 1) for _ in "io")
        self.transformer_blocks = nn.ModuleList([Block(width, context, heads)])

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        h = self.proj_in(self.norm(x))
        rows = self.transformer_blocks[0](h.flatten(2).mT, context, options)
        return x + self.proj_out(rows.mT.view_as(h))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class UNet(nn.Module):
    """Two levels of one layer, attention on the first and in the middle."""

    def __init__(self, width: int, context: int, heads: int = 4) -> None:
        super().__init__()
        emb, two = 4 * width, 2 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = _blocks(
            [nn.Conv2d(4, width, 3, padding=1)],
            [ResBlock(width, width, emb), SpatialTransformer(width, context, heads)],
            [Downsample(width)], [ResBlock(width, two, emb)],
        )  # fmt: skip
        middle = ResBlock(two, two, emb), SpatialTransformer(two, context, heads), ResBlock(two, two, emb)
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = _blocks(
            [ResBlock(2 * two, two, emb)], [ResBlock(two + width, two, emb), Upsample(two)],
            [ResBlock(two + width, width, emb), SpatialTransformer(width, context, heads)],
            [ResBlock(two, width, emb), SpatialTransformer(width, context, heads)],
        )  # fmt: skip
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Any = None, context: Any = None, **more: Any) -> Tensor:
        half = self.width // 2
        rates = (-math.log(10000) * torch.arange(half) / half).exp()
        angles = timesteps[:, None].float() * rates
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))
        options, skips = dict(more.get("transformer_options") or {}), []
        for number, block in enumerate(self.input_blocks):
            x = _run(block, x, emb, context, options | {"block": ("input", number)})
            skips.append(x)
        x = _run(self.middle_block, x, emb, context, options | {"block": ("middle", 0)})
        for number, block in enumerate(self.output_blocks):
            x = torch.cat([x, skips.pop()], 1)
            x = _run(block, x, emb, context, options | {"block": ("output", number)})
        return self.out(x)


def _blocks(*blocks: list[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList([nn.ModuleList(block) for block in blocks])


def _run(block: nn.ModuleList, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
    for part in block:
        if isinstance(part, ResBlock):
            x = part(x, emb)
        else:
            x = part(x, context, options) if isinstance(part, SpatialTransformer) else part(x)
    return x


class Model:
    """A checkpoint that predicts noise, asked in the scale of sigmas."""

    def __init__(self, unet: UNet, alphas: Tensor) -> None:
        self.diffusion_model = unet
        self.sigmas = ((1 - alphas) / alphas).sqrt()

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Any = None, **more: Any) -> Tensor:
        sigma = t.view(-1, 1, 1, 1)
        times = (t.log()[:, None] - self.sigmas.log()).abs().argmin(1).float()
        scaled = x / (sigma**2 + 1).sqrt()
        named = {"context": c_crossattn, "transformer_options": more.get("transformer_options")}
        return x - sigma * self.diffusion_model(scaled, times, **named)


class ModelPatcher:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def set_model_sampler_post_cfg_function(self, after: Any) -> None:
        own = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*own, after]

    def set_model_attn2_replace(self, patch: Any, block: str, number: int) -> None:
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault("attn2", {})[(block, number)] = patch


@torch.no_grad()
def sample(
    patcher: ModelPatcher, x: Tensor, sigmas: Tensor, scale: float, conds: tuple[Tensor, Tensor]
) -> Tensor:
    """Euler from latents [1, c, h, w] at the first sigma; `conds` are positive and negative."""
    options = patcher.model_options
    for sigma, following in pairwise(sigmas):
        given = {"c_crossattn": torch.cat(conds[::-1]), "transformer_options": options["transformer_options"]}
        call = {"input": torch.cat([x, x]), "timestep": sigma.expand(2), "c": given, "cond_or_uncond": [1, 0]}
        wrapper = options.get("model_function_wrapper")
        if wrapper is None:
            both = patcher.model.apply_model(call["input"], call["timestep"], **given)
        else:
            both = wrapper(patcher.model.apply_model, call)
        uncond, cond = both.chunk(2)
        denoised = uncond + scale * (cond - uncond)
        for after in options.get("sampler_post_cfg_function", []):
            denoised = after({"denoised": denoised, "sigma": sigma, "input": x, "cond_scale": scale})
        x = x + (x - denoised) / sigma * (following - sigma)
    return x
