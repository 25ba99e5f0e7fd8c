"""How much of a concept leaks past an SDXL erasure through the pooled text, at SDXL's full widths.

    python tests/benchmarks/sdxl_pooled.py --work build-real-size

On the random SDXL that `real_size.py` builds there, and the files that it makes of it: the distance of the
erased model's noise to the noise of the anchor's prompt, over the distance that the base has, mean over
prompts and timesteps; first with the edits of cross-attention alone, then with these and the anchor's pooled
text put in by hand, then with the whole erasure. 0 is the anchor itself, 1 the untouched base.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from real_size import ANCHOR, CONCEPT, dtype

from conceptzap import format
from conceptzap.base import Base, Cond, load_base
from conceptzap.edit import Edit
from conceptzap.runtime.attach import attached

PROMPTS = ("a photo of a {}", "a {} by the sea", "a painting of a {} at night", "a small {}")
TIMESTEPS = (900, 500, 100)


@torch.no_grad()
def distance(base: Base, asked: Cond, wanted: Cond, edits: list[Edit]) -> float:
    """Mean distance of the noise for `asked` under the edits to the base's noise for `wanted`."""
    noise = base.noise(range(len(PROMPTS)))  # [n, 4, h, w]
    total = 0.0
    for t in TIMESTEPS:
        target = base.eps(noise, t, wanted)
        with attached(base.unet, edits):
            given = base.eps(noise, t, asked)
        total += (given.float() - target.float()).flatten(1).norm(dim=1).mean().item()
    return total / len(TIMESTEPS)


def shares(base: Base, edits: list[Edit]) -> dict[str, float]:
    """The three distances, over the base's own."""
    asked = base.encode([text.format(CONCEPT) for text in PROMPTS])
    wanted = base.encode([text.format(ANCHOR) for text in PROMPTS])
    text = [edit for edit in edits if all(".attn2" in site for site in edit.sites)]
    whole = distance(base, asked, wanted, [])
    by_hand = replace(asked, pooled=wanted.pooled)
    found = {
        "cross-attention alone": distance(base, asked, wanted, text),
        "with the anchor's pooled text by hand": distance(base, by_hand, wanted, text),
        "the erasure": distance(base, asked, wanted, edits),
    }
    return {name: round(value / whole, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build-real-size"))
    parser.add_argument("--methods", nargs="+", default=["uce", "zap"])
    args = parser.parse_args()
    base = load_base(str(args.work / "sdxl"), dtype=dtype())
    files = {name: format.load(args.work / f"sdxl-{name}.lprompt.safetensors") for name in args.methods}
    print(json.dumps({name: shares(base, list(one.edits)) for name, one in files.items()}, indent=1))


if __name__ == "__main__":
    main()
