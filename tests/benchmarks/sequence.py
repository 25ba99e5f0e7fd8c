"""Concepts one after another: what is left of every erasure as more come after it, as Markdown.

    python tests/benchmarks/sequence.py -o sequence                    # 8 concepts, by cidm
    python tests/benchmarks/sequence.py --method esd --concepts 3 -o sequence-esd

File k is made `--after` files 1 to k - 1; then files 1 to k act together. E is the share of a concept's
pictures in which neither judge sees it (`closing`, n = 24 each), P what the judges still recognise of the
rest. Forgetting of a concept is its best E so far less its last one. With --alone no file knows of the
others. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conceptzap import api, format
from conceptzap.base import Base, load_base
from conceptzap.edit import Erasure
from conceptzap.errors import ThresholdError
from conceptzap.evaluation.closing import closing
from conceptzap.format import naming
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.terminal.progress import Progress
from conceptzap.verbs.generating import usual

# DEV concepts of the demo, styles and things by turns; each becomes what `erase` finds near
SEQUENCE = ("Van Gogh", "church", "Seurat", "cat", "pencil sketch", "parachute", "gas pump", "pizza")
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="cidm")
    parser.add_argument("--concepts", type=int, default=len(SEQUENCE), choices=range(1, len(SEQUENCE) + 1))
    parser.add_argument("--set", action="append", default=[], help="a setting of the method, key=value")
    parser.add_argument("--alone", action="store_true", help="no file is made after the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("sequence"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    base, chosen = load_base("demo"), SEQUENCE[: given.concepts]
    files: list[Path] = []
    rows: list[list[dict[str, Any]]] = []
    for number, concept in enumerate(chosen, 1):
        files.append(erased(base, concept, [] if given.alone else files, given))
        kept = given.output / f"after-{number}.json"
        if not kept.is_file():
            together = [format.load(path) for path in files]
            kept.write_text(json.dumps([figures(base, one, together, given.seed) for one in together]) + "\n")
        rows.append(json.loads(kept.read_text()))
        print(line(number, concept, rows[-1]), flush=True)
    text = "\n".join(table(chosen, rows))
    (given.output / "table.md").write_text(text + "\n")
    print(f"\n{text}")


def erased(base: Base, concept: str, after: list[Path], given: argparse.Namespace) -> Path:
    """The concept's file, made if it is not there yet; one that still leaks is measured all the same."""
    path = naming.erasure_path((concept,), given.output / naming.slug(concept))
    if path.is_file():
        return path
    request = {"method": given.method, "base": base, "seed": given.seed, "output": path}
    overrides = dict(text.split("=", 1) for text in given.set)
    try:
        api.erase(
            concept, after=after, overrides={k: json.loads(v) for k, v in overrides.items()},
            preview=False, harden="none", report=Progress(), **request,
        )  # fmt: skip
    except ThresholdError as error:
        print(error, flush=True)
    return path


def figures(base: Base, one: Erasure, together: list[Erasure], seed: int) -> dict[str, Any]:
    """Scores of one concept under all files that are there."""
    head = one.header
    (made,) = head.made
    task = Task(head.concepts, head.anchors, tuple(made["keep"]), tuple(made["kinds"]))
    edits = [edit for erasure in together for edit in erasure.edits]
    found = closing(base, edits, task, replace(usual(base), batch=BATCH), seed, Report())
    return {"concept": head.concepts[0]} | {name: score.record() for name, score in found.scores.items()}


def line(number: int, concept: str, row: list[dict[str, Any]]) -> str:
    seen = ", ".join(f"{one['concept']} {1 - one['leak']['value']:.2f}" for one in row)
    return f"{number}. after {concept}: E {seen}; P {row[-1]['preservation']['value']:.3f}"


def table(concepts: Sequence[str], rows: list[list[dict[str, Any]]]) -> list[str]:
    """E of every concept after each file, P, then the forgetting of each."""
    gone = [[1 - one["leak"]["value"] for one in row] for row in rows]
    lines = [f"| after | {' | '.join(concepts)} | P |", "|---|" + "---|" * (len(concepts) + 1)]
    for concept, row, values in zip(concepts, rows, gone, strict=True):
        cells = [f"{value:.2f}" for value in values] + [""] * (len(concepts) - len(values))
        lines.append(f"| {concept} | {' | '.join(cells)} | {row[-1]['preservation']['value']:.3f} |")
    lost = [max(r[j] for r in gone[j:]) - gone[-1][j] for j in range(len(concepts))]
    mean = sum(lost[:-1]) / max(1, len(lost) - 1)  # the last one has nothing after it
    lines.append(f"| forgotten | {' | '.join(f'{value:.2f}' for value in lost)} | mean {mean:.3f} |")
    return lines


if __name__ == "__main__":
    main()
