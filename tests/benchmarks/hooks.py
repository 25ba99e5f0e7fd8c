"""What the hooks of one UNet call cost by themselves, beside the call of a narrow UNet of the same build.

    python tests/benchmarks/hooks.py [--rounds 100]

Stable Diffusion 1.5's and SDXL's UNets, 32 channels wide on 8 x 8 latents, so that hardly anything is
computed and what is left is Python and the starting of operations, as on a GPU that waits for them. The
hooks of a call are run in its order without the modules between them; the least of all rounds, in
microseconds of the thread's CPU. `shut`: a text that was seen before and opens none of the files; `open`:
one that opens one of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from many_files import OPEN, SHUT, erasure

from conceptzap.base.single_file import CONFIGS
from conceptzap.runtime.attach import Attachment

CHANNELS = 32


def unet(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    config = json.loads((CONFIGS / family / "unet" / "config.json").read_text())
    widths = [CHANNELS] * len(config["block_out_channels"])
    config |= {"block_out_channels": widths, "norm_num_groups": 8, "cross_attention_dim": 768}
    return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


def least(work: Callable[[], Any], rounds: int) -> float:
    """Microseconds of the quickest of some runs."""
    took = []
    for _ in range(rounds):
        began = time.thread_time_ns()
        work()
        took.append((time.thread_time_ns() - began) / 1e3)
    return min(took)


class Bench:
    def __init__(self, family: str) -> None:
        self.unet = unet(family)
        paths = [name for name, _ in self.unet.named_modules() if name.endswith(".attn2")]
        self.sites = [f"unet.{path}" for path in paths]
        self.crosses = [self.unet.get_submodule(path) for path in paths]
        self.inside = torch.randn(2, 64, CHANNELS)
        states = torch.randn(2, 77, 768)
        self.given = {"sample": torch.randn(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": states}
        if family == "sdxl":
            added = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.randn(2, 6)}
            self.given["added_cond_kwargs"] = added

    def hooks(self) -> None:
        """All hooks of one call, each given what the module before it would give."""
        _before(self.unet, (), self.given)
        kwargs = {"encoder_hidden_states": self.given["encoder_hidden_states"], "attention_mask": None}
        for cross in self.crosses:
            args, more = _before(cross, (self.inside,), kwargs)
            for layer in (cross.to_k, cross.to_v):
                (x,), _ = _before(layer, (more["encoder_hidden_states"],), {})
                _after(layer, x.new_empty(2, x.shape[1], CHANNELS))
            _after(cross, args[0])
        _after(self.unet, (self.given["sample"],))

    @torch.no_grad()
    def figures(self, rounds: int) -> dict[str, Any]:
        self.unet(**self.given)
        call = least(lambda: self.unet(**self.given), max(5, rounds // 4))
        bare = least(self.hooks, rounds)
        found: dict[str, Any] = {"call": round(call)}
        for name, count, opened in (("1 shut", 1, 0), ("1,000 shut", 1000, 0), ("1 open", 0, 1)):
            files = [erasure(self.sites, n, SHUT) for n in range(count)]
            files += [erasure(self.sites, count, OPEN)] * opened
            attachment = Attachment(self.unet, [edit for one in files for edit in one.edits])
            self.hooks()
            cost = least(self.hooks, rounds) - bare
            attachment.remove()
            found[name] = {"hooks": round(cost), "of the call": round(cost / call, 4)}
        return found


def _before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    for hook in list(module._forward_pre_hooks.values()):
        args, kwargs = hook(module, args, kwargs) or (args, kwargs)
    return args, kwargs


def _after(module: Any, output: Any) -> None:
    for hook in list(module._forward_hooks.values()):
        hook(module, (), {}, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({family: Bench(family).figures(args.rounds) for family in ("sd1", "sdxl")}, indent=1))


if __name__ == "__main__":
    main()
