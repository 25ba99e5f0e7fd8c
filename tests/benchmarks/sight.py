"""What the gate that looks does by itself, whatever the text gates say.

    python tests/benchmarks/sight.py van-gogh-hardened.lprompt.safetensors
    python tests/benchmarks/sight.py van-gogh-hardened.lprompt.safetensors --suite standard --kept 240

Draws prompts that name the concept under the edits behind `sight` gates alone, as if a text had been
found that opens no other gate and still means the concept; and prompts that must stay under the whole
file. Prints in how many pictures a judge sees the concept, and in how many an edit was open. With `--alone`
as in programs that do not say which rows are unconditional: each is read by itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.edit import Edit
from conceptzap.evaluation import probes, suites
from conceptzap.evaluation.comparison import annotate
from conceptzap.evaluation.judging import Judge
from conceptzap.evaluation.probes import Subject
from conceptzap.registry import family
from conceptzap.result import Probe, Settings, wilson
from conceptzap.runtime import guides
from conceptzap.runtime.sampler import drawings

SETTINGS = Settings(batch=16)


def row(
    base: Base, judges: Sequence[Judge], target: Subject, asked: Sequence[Probe], edits: Sequence[Edit]
) -> dict:
    drawn = list(drawings(base, [p.prompt for p in asked], [p.seed for p in asked], SETTINGS, edits))
    pictures = np.stack([np.asarray(one.picture) for one in drawn])  # [n, h, w, 3]
    noted, _ = annotate([judge.predict(pictures) for judge in judges])
    seen = sum(one.seen(target.kind, target.name) for one in noted)
    prompts = [probe.prompt for probe, one in zip(asked, drawn, strict=True) if one.fired]
    opened = len(prompts)
    return {"n": len(asked), "seen": seen, "seen 95 %": wilson(seen, len(asked)), "opened": opened,
            "opened 95 %": wilson(opened, len(asked)), "opened for": prompts}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--pictures", type=int, default=16, help="that name the concept")
    parser.add_argument("--kept", type=int, default=16, help="that must stay, evenly out of the suite")
    parser.add_argument("--suite", default="smoke")
    parser.add_argument("--alone", action="store_true", help="nobody says which rows are unconditional")
    args = parser.parse_args()
    if args.alone:
        guides.unconditional = lambda rows, ours: 0
    base, erasure = load_base("demo"), format.load(args.file)
    looking = [edit for edit in erasure.edits if any(gate.kind == "sight" for gate in edit.gates)]
    suite, world = suites.load(args.suite)
    target = world.find(erasure.header.concepts[0])
    few = replace(suite, erase={name: args.pictures for name in suite.erase})
    asked = probes.expand(few, world, [target], seed=0)
    named = [probe for probe in asked if probe.erases][: args.pictures]
    kept = [probe for probe in asked if not probe.erases]
    kept = kept[:: max(1, len(kept) // args.kept)][: args.kept]
    judges = family.load("judges", "demo").load(base)
    print(json.dumps({
        "named, behind this gate alone": row(base, judges, target, named, looking),
        "kept, under the whole file": row(base, judges, target, kept, erasure.edits),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
