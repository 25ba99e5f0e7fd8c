"""What an erasure of the demo base removes and what it costs, on prompts and seeds it was not trained on.

    python tests/benchmarks/erasure.py "Van Gogh" van-gogh.lprompt.safetensors
    python tests/benchmarks/erasure.py church church.lprompt.safetensors --key church.key.lprompt.safetensors

Base and erased pictures share prompt and seed. A concept leaks when either judge sees it; a picture
is right when both judges name its object (and, where the prompt names one, its style). Prompts are
the held-out wordings; objects that erasing used as fillers are left out of the style's prompts. With
`--key`, the key and a random key of equal norm are put on as well. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from conceptzap import format, prompts, sampler
from conceptzap.base import Base, load_base
from conceptzap.demo import world
from conceptzap.edit import Edit
from conceptzap.judges.demo import DemoJudge, judge_nets
from conceptzap.result import Settings, wilson

SETTINGS = Settings(batch=24)
FIRST_SEED = 500_000  # far from every seed that erasing draws with


class Asked:
    """Prompts with the object and style they name, one seed each."""

    def __init__(self, cells: list[tuple[str, str, str]], first_seed: int) -> None:
        self.prompts = [prompt for prompt, _, _ in cells]
        self.objects = [thing for _, thing, _ in cells]
        self.styles = [style for _, _, style in cells]
        self.seeds = list(range(first_seed, first_seed + len(cells)))

    def draw(self, base: Base, edits: tuple[Edit, ...] = ()) -> Seen:
        return Seen(self, sampler.draw(base, self.prompts, self.seeds, SETTINGS, edits))


class Seen:
    """What both judges say of the pictures."""

    def __init__(self, asked: Asked, pictures: torch.Tensor) -> None:
        self.pictures = pictures
        chunks = [pictures[i : i + 100] for i in range(0, len(pictures), 100)]
        self.top: dict[str, list[list[str]]] = {"object": [], "style": []}
        for judge in JUDGES:
            looks = [judge.look(chunk) for chunk in chunks]
            for kind in self.top:
                self.top[kind].append([row[0] for look in looks for row in look.labels[kind]])
        self.object_right = self.both("object", asked.objects)
        self.style_right = self.both("style", asked.styles)

    def both(self, kind: str, wanted: list[str]) -> np.ndarray:
        return np.all([np.array(labels) == np.array(wanted) for labels in self.top[kind]], 0)

    def either(self, kind: str, name: str) -> np.ndarray:
        return np.any([np.array(labels) == name for labels in self.top[kind]], 0)


def rate(hits: np.ndarray) -> dict[str, float]:
    low, high = wilson(int(hits.sum()), len(hits))
    return {"value": round(float(hits.mean()), 4), "low": round(low, 4), "high": round(high, 4), "n": len(hits)}


def difference(before: np.ndarray, after: np.ndarray, clusters: list[str]) -> dict[str, float]:
    """Mean of after - before with a bootstrap over clusters (4,000 draws)."""
    names = sorted(set(clusters))
    index = np.array([names.index(cluster) for cluster in clusters])
    delta = after.astype(float) - before
    sums, sizes = (np.bincount(index, weights) for weights in (delta, np.ones_like(delta)))
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), 4000)
    low, high = np.percentile((draws @ sums) / (draws @ sizes), (2.5, 97.5))
    return {"value": round(delta.mean(), 4), "low": round(low, 4), "high": round(high, 4), "n": len(delta)}


def concept_cells(concept: str, n: int) -> list[tuple[str, str, str]]:
    """Held-out ways to ask for the concept, n of them."""
    if concept in {style.name for style in world.STYLES}:
        fillers = set(prompts.wording("style")["things"])
        things = [o.name for o in world.OBJECTS if o.name not in fillers]
        ways = world.templates(concept, held_out=True)
        grid = [(world.fill(way, thing), thing, concept) for way, thing in product(ways, things)]
    else:
        grid = [
            (world.fill(way, concept), concept, style.name)
            for style in world.STYLES
            for way in world.templates(style, held_out=True)
        ]
    return [grid[i % len(grid)] for i in range(n)]


def other_cells(gone: set[str], n: int) -> list[tuple[str, str, str]]:
    """All other styles x objects in held-out wordings, n of them spread evenly."""
    grid = [
        (world.caption(thing, style, number, held_out=True), thing.name, style.name)
        for number, (style, thing) in enumerate(product(world.STYLES, world.OBJECTS))
        if not {style.name, thing.name} & gone
    ]
    order = np.random.default_rng(1).permutation(len(grid))
    return [grid[order[i % len(grid)]] for i in range(n)]


def random_like(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """The same edits with random tensors of the same norms."""
    generator = torch.Generator().manual_seed(7)

    def other(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return noise * tensor.float().norm() / noise.norm()

    return tuple(replace(e, tensors={k: other(t) for k, t in e.tensors.items()}) for e in edits)


def measure(base: Base, concept: str, gone: set[str], edits: tuple[Edit, ...], key: tuple[Edit, ...], n: int, kept: int) -> dict:
    kind = "style" if concept in {style.name for style in world.STYLES} else "object"
    asked, others = Asked(concept_cells(concept, n), FIRST_SEED), Asked(other_cells(gone, kept), FIRST_SEED + n)
    before, after = asked.draw(base), asked.draw(base, edits)
    was, now = others.draw(base), others.draw(base, edits)
    clusters = [f"{o}/{s}" for o, s in zip(others.objects, others.styles, strict=True)]
    had = before.either(kind, concept)
    result = {
        "base shows it": rate(had),
        "leak": rate(after.either(kind, concept)),
        "other objects and styles": difference(was.object_right & was.style_right, now.object_right & now.style_right, clusters),
        "others bit-identical, batched": rate((was.pictures == now.pictures).flatten(1).all(1).numpy()),
    }
    if kind == "style":
        result["object still right"] = rate(after.object_right[before.object_right])
    else:
        result["style still right"] = rate(after.style_right[before.style_right])
    if key:
        for name, extra in (("key", key), ("random key", random_like(key))):
            shown = asked.draw(base, (*edits, *extra)).either(kind, concept)
            result[f"with {name}, of what the base showed"] = rate(shown[had])
        keyed = others.draw(base, (*edits, *key))
        result["others with key"] = difference(was.object_right & was.style_right, keyed.object_right & keyed.style_right, clusters)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("concept")
    parser.add_argument("file", nargs="+")
    parser.add_argument("--key")
    parser.add_argument("--base", default="demo")
    parser.add_argument("-n", type=int, default=240)
    parser.add_argument("--kept", type=int, default=520)
    args = parser.parse_args()
    base = load_base(args.base)
    loaded = [format.load(path) for path in args.file]
    edits = tuple(edit for erasure in loaded for edit in erasure.edits)
    gone = {concept for erasure in loaded for concept in erasure.header.concepts}
    key = format.load(args.key).edits if args.key else ()
    print(json.dumps(measure(base, args.concept, gone, edits, key, args.n, args.kept), indent=1))


JUDGES = [DemoJudge(name) for name in judge_nets.JUDGES]

if __name__ == "__main__":
    main()
