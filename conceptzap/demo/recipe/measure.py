"""Measure the demo checkpoint: `python -m conceptzap.demo.recipe.measure`.

Draws every object in every style from held-out captions and fresh seeds, and asks both judges.
"Right" means that both judges agree; the figures of each stand beside it.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from conceptzap.demo.judge_nets import JUDGES, load_judge
from conceptzap.demo.world import OBJECTS, STYLES, caption, templates
from conceptzap.result import wilson

CHECKPOINT = Path(__file__).parents[1] / "checkpoint"
RESULT = Path(__file__).parents[1] / "accuracy.json"
_BATCH = 24
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture to draw: what is asked for, in which words, from which seed."""

    object: int
    style: int
    prompt: str
    seed: int


def grid(rounds: int) -> list[Cell]:
    """Every object x style, `rounds` times, with held-out captions and their own seeds."""
    cells = []
    for turn in range(rounds):
        for number, thing in enumerate(OBJECTS):
            for look, style in enumerate(STYLES):
                choice = (number + look + turn) % len(templates(style, held_out=True))
                seed = zlib.crc32(f"measure:{thing.name}:{style.name}:{turn}".encode())
                prompt = caption(thing, style, choice, held_out=True)
                cells.append(Cell(number, look, prompt, seed))
    return cells


def draw(pipe: StableDiffusionPipeline, cells: list[Cell], steps: int, guidance: float) -> Tensor:
    """Pictures [n, 3, 64, 64] in 0..1."""
    parts = []
    for start in range(0, len(cells), _BATCH):
        batch = cells[start:start + _BATCH]
        out = pipe(
            [cell.prompt for cell in batch], num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(cell.seed) for cell in batch],
            output_type="pt")
        parts.append(out.images.float())
    return torch.cat(parts)


@torch.no_grad()
def judge(pictures: Tensor) -> dict[str, dict[str, Tensor]]:
    """By judge: the object, the style and the validity of each picture."""
    verdicts = {}
    for name in JUDGES:
        net, _ = load_judge(name)
        found = [net(part) for part in pictures.split(128)]
        verdicts[name] = {
            "object": torch.cat([v.object.argmax(1) for v in found]),
            "style": torch.cat([v.style.argmax(1) for v in found]),
            "valid": torch.cat([v.valid > 0 for v in found])}
    return verdicts


def share(right: Tensor) -> dict[str, object]:
    """A share with its interval and count."""
    hits, count = int(right.sum()), len(right)
    interval = [round(end, 4) for end in wilson(hits, count)]
    return {"value": round(hits / count, 4), "interval": interval, "n": count}


def summarise(cells: list[Cell], verdicts: dict[str, dict[str, Tensor]]) -> dict[str, object]:
    """Whole-grid, per-object and per-style accuracy, and false alarms."""
    result: dict[str, object] = {}
    for kind, names in (("object", [o.name for o in OBJECTS]), ("style", [s.name for s in STYLES])):
        asked = torch.tensor([getattr(cell, kind) for cell in cells])
        right = {judge: found[kind] == asked for judge, found in verdicts.items()}
        both = torch.stack(list(right.values())).all(0)
        result[kind] = {"both": share(both)} | {name: share(hit) for name, hit in right.items()}
        result[f"per_{kind}"] = {}
        for number, name in enumerate(names):
            others = asked != number
            alarms = [(found[kind] == number) & others for found in verdicts.values()]
            alarm = torch.stack(alarms).any(0)[others]
            result[f"per_{kind}"][name] = share(both[~others]) | {
                "false_alarm": round(float(alarm.float().mean()), 4)}
    valid = torch.stack([found["valid"] for found in verdicts.values()]).all(0)
    return result | {"valid": share(valid)}


def seconds_per_picture(pipe: StableDiffusionPipeline, steps: int, guidance: float) -> float:
    """Median time of one picture drawn alone."""
    times = []
    for turn in range(_WARM_UP + 7):
        start = time.perf_counter()
        pipe("a cat", num_inference_steps=steps, guidance_scale=guidance,
             generator=torch.Generator().manual_seed(turn))
        times.append(time.perf_counter() - start)
    return round(sorted(times[_WARM_UP:])[3], 3)


def measure(folder: Path, rounds: int, steps: int, guidance: float) -> dict[str, object]:
    """All figures of a checkpoint folder."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    cells = grid(rounds)
    figures = summarise(cells, judge(draw(pipe, cells, steps, guidance)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    settings = {"rounds": rounds, "steps": steps, "guidance": guidance, "scheduler": "DDIM"}
    return {"settings": settings, "bytes": size,
            "seconds_per_picture": seconds_per_picture(pipe, steps, guidance)} | figures


def targets(figures: dict[str, object]) -> list[str]:
    """Concepts drawn well enough to be test targets: right >= 90 %, false alarms <= 2 %."""
    every = {**figures["per_object"], **figures["per_style"]}
    return [name for name, row in every.items()
            if row["value"] >= 0.9 and row["false_alarm"] <= 0.02]


def main() -> None:
    """Parse the command line, measure, write the JSON and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--rounds", type=int, default=2, help="pictures a cell of the grid")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    figures = measure(args.checkpoint, args.rounds, args.steps, args.guidance)
    figures["targets"] = targets(figures)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    for kind in ("object", "style"):
        rows = figures[f"per_{kind}"]
        worst = sorted(rows, key=lambda name: rows[name]["value"])[:8]
        print(kind, {name: figures[kind][name]["value"] for name in ("both", *JUDGES)},
              "lowest:", {name: rows[name]["value"] for name in worst})
    print("valid", figures["valid"]["value"], "seconds", figures["seconds_per_picture"],
          "bytes", figures["bytes"], "targets", len(figures["targets"]))


if __name__ == "__main__":
    main()
