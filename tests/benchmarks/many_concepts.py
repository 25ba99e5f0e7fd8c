"""What a run over many concepts costs, and what the stack of all is worth, on the built-in checkpoint.

    python tests/benchmarks/many_concepts.py [--concepts 60] [--method M ...] [--set key=value ...]
                      [--limit N] [--elastic] [--pictures 4] [--kept 128] [--identical 32] [--output DIR]

So many of the demo's 75 concepts, styles and objects, all but fifteen by default, go through `erase --from`
with a method; then the stack of all is asked for what is gone and for the rest, as `evaluate` does. Printed
as one JSON object for each method: seconds a concept, seconds in all (wall, and CPU of this process, the
stack's own closing figures included), what failed, bytes of the stack, for how many of these pictures
anything in it acts by its text gates (nothing is drawn for that), then E, P and the share of bit-identical
pictures with their 95 % intervals. With --elastic the stack is made again, what acts on every
prompt gated (`stack --elastic`). The cache is its own, so that nothing is drawn beforehand; what is finished
is kept in --output. `accelerate launch --multi_gpu --num_processes 2 tests/benchmarks/many_concepts.py ...` erases
in two processes (name an --output; with --pictures 0 it ends there).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

REST = 10  # concepts that stay at least, of the demo's 75
FIGURES = (("E", ""), ("P", ""), ("H", ""), ("identical", ""), ("P", "keep/unrelated"), ("P", "keep/style"))


def concepts(count: int) -> list[dict[str, str]]:
    """So many of the demo's concepts, evenly over all, each with its kind; the others stay."""
    from conceptzap.evaluation import suites
    from conceptzap.training import wordings

    _, world = suites.load("quick")
    subjects = [
        one for one in world.subjects  # what others become by default cannot become itself
        if one.name not in (world.plain, wordings.usual_anchor(one.name, one.kind))
    ]  # fmt: skip
    count = min(count, len(world.subjects) - REST)
    chosen = [subjects[index * len(subjects) // count] for index in range(count)]
    return [{"name": one.name, "kind": one.kind} for one in chosen]


def run(method: str, rows: list[dict[str, str]], args: argparse.Namespace) -> dict[str, Any]:
    """Erase the rows, stack and evaluate them."""
    import conceptzap
    from conceptzap.registry.config import parse_sets
    from conceptzap.terminal.progress import Progress

    wall, cpu = time.monotonic(), time.process_time()
    try:
        done = conceptzap.erase_all(
            rows, method=method, overrides=parse_sets(args.set), limit=args.limit,
            output=args.output / method, report=Progress(),
        )  # fmt: skip
    except conceptzap.ThresholdError as error:  # not erased is a figure like another
        done = error.made
    spent = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    each = [one.seconds for one in done.files if not one.kept]
    told = {
        "method": method, "concepts": len(rows), "made": len(each),
        "failed": [one.concept for one in done.failed],
        "verdict": done.verdict, "seconds a concept": round(sum(each) / max(1, len(each)), 2),
        "seconds in all": {name: round(value, 1) for name, value in spent.items()},
    }  # fmt: skip
    if done.stack is None:
        return told
    stack = done.stack
    if args.elastic:
        paths, target = [one.path for one in done.files], args.output / f"{method}-elastic"
        began = time.monotonic()
        stack = conceptzap.api.stack_files(paths, target, True, Progress(), "demo", elastic=True)
        told["seconds to gate the stack"] = round(time.monotonic() - began, 1)
    told |= {"bytes": stack.bytes, "gates that open for others": stack.overlaps.record()["gates"]}
    return told | measured(stack.path, [row["name"] for row in rows], args)


def measured(path: Path, names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """E, P and the share of bit-identical pictures of a stack: a few prompts a concept, many of the rest."""
    from conceptzap.base import load_base
    from conceptzap.evaluation import cached, probes, run
    from conceptzap.terminal.progress import Progress
    from conceptzap.trust import admission
    from conceptzap.verbs import evaluating

    base = load_base("demo", "cpu")
    experiment = evaluating.settle(base, "quick", names)
    count = args.pictures or 4
    erase = {"held-out": (count + 1) // 2, "synonym": count // 2}
    keep = {"unrelated": args.kept // 2, "style": args.kept // 2}
    suite = replace(experiment.suite, erase=erase, keep=keep, neighbours=0, identical=args.identical)
    loaded = admission.load_all([path])
    asked = probes.expand(suite, experiment.world, experiment.targets, seed=experiment.seed)
    edits = [edit for one in loaded for edit in one.erasure.with_role("erase")]
    acts = cached.acted_on(base, edits, asked, experiment.settings)
    told: dict[str, Any] = {"acts": {}}
    for probe, act in zip(asked, acts, strict=True):
        of, n = told["acts"].get(probe.slice, (0, 0))
        told["acts"][probe.slice] = (of + act, n + 1)
    if not args.pictures:
        return told
    result = run.evaluate(base, loaded, replace(experiment, suite=suite), Progress()).result
    scores = {f"{metric} {slice}".strip(): result.score(metric, slice) for metric, slice in FIGURES}
    return told | {
        name: {key: round(value, 4) for key, value in score.record().items()}
        for name, score in scores.items() if score
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=60)
    parser.add_argument("--method", action="append")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--elastic", action="store_true", help="gate what acts on every prompt")
    parser.add_argument("--limit", type=int, help="pictures that each file is judged by; the stack is anyhow")
    parser.add_argument("--pictures", type=int, default=4, help="of a concept in E; 0 measures nothing")
    parser.add_argument("--kept", type=int, default=128, help="of the rest in P")
    parser.add_argument("--identical", type=int, default=32, help="of the rest drawn one by one")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    args.output = args.output or Path(tempfile.mkdtemp(prefix="many-concepts-"))
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ["CONCEPTZAP_CACHE"] = str(args.output / "cache")
    rows = concepts(args.concepts)
    from conceptzap.verbs import launched

    for method in args.method or ["uce", "zap"]:
        told = run(method, rows, args)
        if launched.leads():
            print(json.dumps(told, indent=1), flush=True)


if __name__ == "__main__":
    main()
