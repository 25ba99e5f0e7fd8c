"""The demo drawn by a real ComfyUI engine, with an erasure on its MODEL by the nodes and without.

    python tests/benchmarks/comfyui.py van-gogh.lprompt.safetensors --label "Van Gogh"
    python tests/benchmarks/comfyui.py --full-size

Needs the engine of `tests/comfy_engine.py`. Prints in how many pictures the demo's judge sees the label, for
the plain model and the erased one; the largest difference to our own sampler's latents; whether the plain
model draws the same bits after the erased one has drawn; and the receipts. --full-size takes a random UNet
of Stable Diffusion 1.5 in full width instead, from one file that ComfyUI itself tells the kind of, at 8 x 8
latents (about 9 GB of memory): largest differences to our sampler, and whether shut and removed is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import comfy_engine
import many_files

from conceptzap import format
from conceptzap.base import Base, Cond, load_base, original
from conceptzap.integrations import comfyui as comfy_nodes
from conceptzap.judges.demo import DemoJudge
from conceptzap.result import Settings
from conceptzap.runtime.attach import attached
from conceptzap.runtime.sampler import denoise
from conceptzap.testing import tiny

SHAPE = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 3], "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1, "num_heads": 4, "num_head_channels": -1, "use_spatial_transformer": True,
    "use_linear_in_transformer": False, "use_checkpoint": False, "legacy": False, "adm_in_channels": None,
    "use_temporal_attention": False,
}  # fmt: skip


def patcher(engine: Any, base: Base) -> Any:
    """The demo's UNet in ComfyUI, by its original names; its norms have groups of their own."""
    shape, device = {**SHAPE, "context_dim": base.unet.config.cross_attention_dim}, torch.device("cpu")
    config = engine.supported_models.SD15(shape)
    config.unet_config = shape
    config.set_inference_dtype(torch.float32, None)
    model = engine.model_base.BaseModel(config, engine.model_base.ModelType.EPS, device=device)
    names = original.unet_names(base.unet)
    weights = {names[name]: value for name, value in base.unet.named_parameters()}
    model.diffusion_model.load_state_dict(weights)
    for module in model.diffusion_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = base.unet.config.norm_num_groups
    return engine.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def draw(
    engine: Any, base: Base, model: Any, texts: Sequence[Cond], seed: int, settings: Settings
) -> Tensor:
    """ComfyUI's Euler over the noise levels of our DDIM: the same latents [1, c, h, w]."""
    scheduler = base.scheduler()
    scheduler.set_timesteps(settings.steps)
    sigmas = ((1 - base.alphas) / base.alphas).sqrt()[[*scheduler.timesteps.tolist(), 0]]
    noise = base.noise([seed]) * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
    conds = ([[text.states, {}]] for text in texts)
    found = engine.sample.sample_custom(
        model, noise, settings.guidance, engine.samplers.ksampler("euler"), sigmas, *conds,
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip
    return found * model.model.latent_format.scale_factor * base.alphas[0].sqrt()


def first(labels: Any, row: int) -> set[str]:
    """What a judge calls a picture, of every kind."""
    return {names[row][0] for names in labels.values()}


def full_size(engine: Any, settings: Settings) -> dict[str, Any]:
    """Stable Diffusion 1.5's UNet with random weights: what its program draws of it, beside ours."""
    # 1. the weights in one file, as a checkpoint has them, and what each program makes of it
    unet, prefix = many_files.unet(), "model.diffusion_model."
    unet.register_to_config(sample_size=8)
    base = replace(tiny("sd1"), unet=unet).frozen()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        names, path = original.unet_names(unet), f"{folder}/model.safetensors"
        for value in unet.parameters():
            value.copy_(value.half())
        save_file({prefix + names[name]: value.half() for name, value in unet.named_parameters()}, path)
        found = load_file(path)
        config = engine.model_detection.model_config_from_unet(found, prefix)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model(found, prefix, device="cpu")
        model.load_model_weights(found, prefix)
        del found
    device = torch.device("cpu")
    plain = engine.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
    # 2. files behind gates that are open, and shut
    sites = [f"unet.{name}" for name, _ in unet.named_modules() if name.endswith(".attn2")]
    files = [format.seal(many_files.erasure(sites, 0, when)) for when in (many_files.OPEN, many_files.SHUT)]
    opened, shut = (comfy_nodes.ApplyErasure().apply(plain, one, 1.0)["result"][0] for one in files)
    states = torch.randn(2, 1, 77, many_files.WIDTH, generator=torch.Generator().manual_seed(0))
    texts = [Cond(one) for one in states]
    # 3. the same latents from both
    models = {"plain": plain, "erased": opened, "shut": shut, "plain again": plain}
    drawn = {name: draw(engine, base, model, texts, 0, settings) for name, model in models.items()}
    ours = {}
    for name, edits in (("plain", ()), ("erased", files[0].edits)):
        with attached(unet, edits):
            ours[name] = list(denoise(base, *texts, settings, base.noise([0])))[-1][1]
    largest = ours["plain"].abs().max()

    def far(one: Tensor, other: Tensor) -> float:
        return ((one - other).abs().max() / largest).item()

    return {
        "the engine calls it": type(config).__name__,
        "difference": {name: far(drawn[name], own) for name, own in ours.items()},
        "the erasure changes": far(ours["erased"], ours["plain"]),
        "shut is plain": drawn["shut"].equal(drawn["plain"]),
        "plain is the same again": drawn["plain again"].equal(drawn["plain"]),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--prompt", default="a cat by Van Gogh")
    parser.add_argument("--label", default="Van Gogh")
    parser.add_argument("--count", type=int, default=8)
    asked = parser.parse_args()
    if lacking := comfy_engine.missing():
        sys.exit(f"no ComfyUI engine: {', '.join(lacking)} not installed")
    if asked.full_size:
        return print(json.dumps(full_size(comfy_engine.engine(), Settings(steps=2)), indent=2))
    base, settings = load_base("demo", "cpu"), Settings()
    texts = base.encode([asked.prompt]), base.unconditional("")
    judges = [DemoJudge(name) for name in ("attention", "residual")]
    engine = comfy_engine.engine()
    plain = patcher(engine, base)
    erasure = format.load(asked.file)
    erased = comfy_nodes.ApplyErasure().apply(plain, erasure, 1.0)["result"][0]
    read, seen, latents = comfy_nodes.ErasureReceipt(), {}, {}
    for name, model in (("plain", plain), ("erased", erased), ("plain again", plain)):
        found = [draw(engine, base, model, texts, seed, settings) for seed in range(asked.count)]
        latents[name] = torch.cat(found)
        pictures = np.asarray(base.decode(latents[name]))
        labels = [judge.predict(pictures).labels for judge in judges]
        rows = range(asked.count)
        seen[name] = sum(any(asked.label in first(one, r) for one in labels) for r in rows)
    with attached(base, erasure.edits):
        ours = list(denoise(base, *texts, settings, base.noise([0])))[-1][1]
    print(json.dumps({
        "prompt": asked.prompt, "n": asked.count, "seen": seen,
        "difference": ((latents["erased"][:1] - ours).abs().max() / ours.abs().max()).item(),
        "plain is the same again": latents["plain"].equal(latents["plain again"]),
        "receipt": read.read({}, erased)["ui"]["text"],
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
