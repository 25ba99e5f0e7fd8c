"""What an attached erasure costs while sampling: the ratio to the base, pair by pair in one run.

    python tests/benchmarks/overhead.py van-gogh.lprompt.safetensors

Each pair draws one picture with the base and one with the file, in changing order. Two prompts: one
that opens the erasure's gates and one that does not, neither the text's nor, in a hardened file, the one
that looks at the picture; how many edits acted is printed, too. Prints the median ratio with a 95 %
bootstrap interval of the median over 30 pairs: of CPU seconds on a CPU, which a busy machine leaves alone.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.edit import Edit
from conceptzap.result import Settings
from conceptzap.runtime import sampler

SETTINGS = Settings()


def seconds(base: Base, prompt: str, seed: int, edits: tuple[Edit, ...]) -> float:
    clock = time.process_time if base.device.type == "cpu" else time.perf_counter
    began = clock()
    sampler.draw(base, [prompt], [seed], SETTINGS, edits)
    return clock() - began


def ratios(base: Base, prompt: str, edits: tuple[Edit, ...], pairs: int) -> np.ndarray:
    seconds(base, prompt, 0, edits), seconds(base, prompt, 0, ())
    result = []
    for pair in range(pairs):
        order = [edits, ()] if pair % 2 else [(), edits]
        took = {bool(which): seconds(base, prompt, pair, which) for which in order}
        result.append(took[True] / took[False])
    return np.array(result)


def median(values: np.ndarray) -> dict[str, float]:
    draws = np.random.default_rng(0).choice(values, (4000, len(values)))
    low, high = np.percentile(np.median(draws, 1), (2.5, 97.5))
    return {"median": round(float(np.median(values)), 4), "low": round(low, 4), "high": round(high, 4), "pairs": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--base", default="demo")
    parser.add_argument("--pairs", type=int, default=30)
    args = parser.parse_args()
    base, erasure = load_base(args.base), format.load(args.file)
    result = {"threads": torch.get_num_threads()}
    for name, prompt in (("gate open", f"a painting of a cat in the style of {erasure.header.concepts[0]}"), ("gate shut", "a dog")):
        result[name] = median(ratios(base, prompt, erasure.edits, args.pairs))
        (drawn,) = sampler.drawings(base, [prompt], [0], SETTINGS, erasure.edits)
        result[name]["edits open"] = len(drawn.fired)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
