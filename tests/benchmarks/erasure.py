"""What erasures of the demo base remove and what they cost, on prompts and seeds they were not trained on.

    python tests/benchmarks/erasure.py "Van Gogh=van-gogh.lprompt.safetensors"
    python tests/benchmarks/erasure.py "Van Gogh=vg.lprompt.safetensors,key=vg.key.lprompt.safetensors"
    python tests/benchmarks/erasure.py "church=a.lprompt.safetensors,b.lprompt.safetensors"

Base and erased pictures share prompt and seed. A concept leaks when either judge sees it; a picture
is right when both judges name its object and style. Prompts are the held-out wordings; objects that
erasing used as fillers are left out of a style's prompts, and what else a stack takes out of all.
A key is put on as it is and as random tensors of equal norm. Prints one JSON object, a record for
each argument, and on stderr each record once it is known.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import torch

from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.demo import world
from conceptzap.edit import Edit, Erasure
from conceptzap.judges.demo import DemoJudge, judge_nets
from conceptzap.result import Settings, wilson
from conceptzap.runtime import sampler
from conceptzap.training import wordings

SETTINGS = Settings(batch=24)
FIRST_SEED = 500_000  # far from every seed that erasing draws with


class Asked:
    """Prompts with the object and style they name, one seed each."""

    def __init__(self, cells: list[tuple[str, str, str]], first_seed: int) -> None:
        self.prompts = [prompt for prompt, _, _ in cells]
        self.objects = [thing for _, thing, _ in cells]
        self.styles = [style for _, _, style in cells]
        self.seeds = list(range(first_seed, first_seed + len(cells)))
        self.seen: dict[tuple[str, ...], Seen] = {}

    def draw(self, base: Base, edits: tuple[Edit, ...] = ()) -> Seen:
        name = tuple(sorted(edit.name for edit in edits))
        if name not in self.seen:
            drawn = list(sampler.drawings(base, self.prompts, self.seeds, SETTINGS, edits))
            opened = np.array([bool(one.fired) for one in drawn])
            self.seen[name] = Seen(self, torch.stack([one.picture for one in drawn]), opened)
        return self.seen[name]


class Seen:
    """What both judges say of the pictures."""

    def __init__(self, asked: Asked, pictures: torch.Tensor, opened: np.ndarray) -> None:
        self.pictures, self.opened = pictures, opened
        chunks = [pictures[i : i + 100] for i in range(0, len(pictures), 100)]
        self.top: dict[str, list[list[str]]] = {"object": [], "style": []}
        for judge in JUDGES:
            looks = [judge.predict(chunk) for chunk in chunks]
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
    return figure(hits.mean(), low, high, len(hits))


def figure(value: float, low: float, high: float, n: int) -> dict[str, float]:
    numbers = {"value": value, "low": low, "high": high}
    return {name: round(float(number), 4) for name, number in numbers.items()} | {"n": n}


def difference(before: np.ndarray, after: np.ndarray, clusters: list[str]) -> dict[str, float]:
    """Mean of after - before with a bootstrap over clusters (4,000 draws)."""
    names = sorted(set(clusters))
    index = np.array([names.index(cluster) for cluster in clusters])
    delta = after.astype(float) - before
    sums, sizes = (np.bincount(index, weights) for weights in (delta, np.ones_like(delta)))
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), 4000)
    low, high = np.percentile((draws @ sums) / (draws @ sizes), (2.5, 97.5))
    return figure(delta.mean(), low, high, len(delta))


def concept_cells(concept: str, gone: frozenset[str], n: int) -> list[tuple[str, str, str]]:
    """Held-out ways to ask for the concept and for nothing else that is `gone`, n of them."""
    if concept in STYLES:
        fillers = set(wordings.wording("style")["things"])
        things = [o.name for o in world.OBJECTS if o.name not in fillers]
        ways = world.templates(concept, held_out=True)
        grid = [(world.fill(way, thing), thing, concept) for way, thing in product(ways, things)]
    else:
        grid = [
            (world.fill(way, concept), concept, style.name)
            for style in world.STYLES
            for way in world.templates(style, held_out=True)
        ]
    grid = [cell for cell in grid if not {*cell[1:]} & gone - {concept}]
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


@cache
def asked_for(concept: str, gone: frozenset[str], n: int) -> Asked:
    return Asked(concept_cells(concept, gone, n), FIRST_SEED)


def measure(
    base: Base, concept: str, asked: Asked, others: Asked, edits: tuple[Edit, ...],
    key: tuple[Edit, ...],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The figures of one erasure; what they are called says how they are counted."""
    kind = "style" if concept in STYLES else "object"
    before, after = asked.draw(base), asked.draw(base, edits)
    was, now = others.draw(base), others.draw(base, edits)
    result = {
        "base shows it": rate(before.either(kind, concept)),
        "leak": rate(after.either(kind, concept)),
        "others, against the base": change(others, was, now),
        "others for which an edit was open": rate(now.opened),
        "others bit-identical": rate((was.pictures == now.pictures).flatten(1).all(1).numpy()),
    }
    if kind == "style":
        result["object still right"] = rate(after.object_right[before.object_right])
    else:
        result["style still right"] = rate(after.style_right[before.style_right])
    if key:
        result |= with_key(base, kind, concept, asked, others, edits, key)
    return result


def with_key(
    base: Base, kind: str, concept: str, asked: Asked, others: Asked,
    edits: tuple[Edit, ...], key: tuple[Edit, ...],
) -> dict[str, dict[str, float]]:  # fmt: skip
    had = asked.draw(base).either(kind, concept)
    shares = {
        f"with {name}, of what the base showed": rate(
            asked.draw(base, (*edits, *extra)).either(kind, concept)[had]
        )
        for name, extra in (("its key", key), ("a random key", random_like(key)))
    }
    keyed = others.draw(base, (*edits, *key))
    return shares | {"others with the key, against the base": change(others, others.draw(base), keyed)}


def change(others: Asked, was: Seen, now: Seen) -> dict[str, float]:
    """Share of pictures with object and style right, minus the base's."""
    clusters = [f"{o}/{s}" for o, s in zip(others.objects, others.styles, strict=True)]
    return difference(was.object_right & was.style_right, now.object_right & now.style_right, clusters)


def load(argument: str) -> tuple[str, list[Erasure], tuple[Edit, ...]]:
    """`CONCEPT=FILE[,FILE...][,key=FILE]`: the concept, its erasures, the key's edits."""
    concept, _, names = argument.partition("=")
    parts = names.split(",")
    keys = [part.removeprefix("key=") for part in parts if part.startswith("key=")]
    files = [format.load(part) for part in parts if not part.startswith("key=")]
    return concept, files, tuple(edit for key in keys for edit in format.load(key).edits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="CONCEPT=FILE[,FILE...][,key=FILE]")
    parser.add_argument("--base", default="demo")
    parser.add_argument("-n", type=int, default=200, help="pictures of the concept")
    parser.add_argument("--kept", type=int, default=500, help="pairs of everything else")
    args = parser.parse_args()
    base = load_base(args.base)
    runs = [load(argument) for argument in args.runs]
    gone = {name for _, files, _ in runs for file in files for name in file.header.concepts}
    others = Asked(other_cells(gone, args.kept), FIRST_SEED + args.n)
    found = []
    for concept, files, key in runs:
        edits = tuple(edit for file in files for edit in file.edits)
        made = [record["method"] for file in files for record in file.header.made]
        together = frozenset(name for file in files for name in file.header.concepts)
        asked = asked_for(concept, together, args.n)
        figures = measure(base, concept, asked, others, edits, key)
        found.append({"concept": concept, "methods": made, "figures": figures})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "runs": found}, indent=1))


STYLES = {style.name for style in world.STYLES}
JUDGES = [DemoJudge(name) for name in judge_nets.JUDGES]

if __name__ == "__main__":
    main()
