"""A list erased by two processes that are killed twice and finished: the bytes of one that nobody kills.

    python tests/benchmarks/launch.py [--concepts 6] [--method uce] [--steps N] [--base demo|tiny|FOLDER]

Three runs of `accelerate launch --multi_gpu --num_processes 2 -m conceptzap erase --from`, the first killed whole
(SIGKILL to the launcher and its processes), the second robbed of one process, each as soon as another file or
checkpoint is there; then the list in one process, elsewhere. Printed as one JSON object: what was there after
each run, how each ended, what was said to be missing, and whether all files are alike, byte for byte.
With a trained method and --steps the kills come inside a training, which the next run takes up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from conceptzap import testing

NAMES = ("cat", "church", "horse", "tree", "house", "car", "apple", "dog", "Monet", "Hokusai")
RUNS = {"killed whole": "group", "one process killed": "one", "finished": ""}


def command(args: argparse.Namespace, processes: int) -> list[str]:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    words = ["-m", "conceptzap", "erase", "--from", "list.csv", "--method", args.method, "--base", args.base]
    steps = ["--steps", str(args.steps)] if args.steps else []
    return [sys.executable, *(launch if processes > 1 else []), *words, "--limit", "0", *steps]


def traces(folder: Path) -> set[Path]:
    """The files, and the whole checkpoints, that are there."""
    return {*folder.glob("list/*.safetensors"), *folder.rglob("step-*")}


def kill(running: subprocess.Popen[str], how: str) -> None:
    """Kill the launcher with all that it started, or one of its two workers."""
    whole = psutil.Process(running.pid)
    workers = whole.children(recursive=True)
    count = sum("conceptzap" in worker.cmdline() for worker in workers)
    assert count == 2, f"{count} processes were launched, not 2"
    for one in (whole, *workers) if how == "group" else workers[-1:]:
        one.kill()


def run(words: list[str], folder: Path, how: str) -> dict[str, object]:
    """Run a launch, killed as soon as there is more than there was."""
    before = traces(folder)
    with (folder / "said").open("w") as said:
        running = subprocess.Popen(
            words, cwd=folder, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
    while how and running.poll() is None and not traces(folder) - before:
        time.sleep(0.02)
    if how:
        kill(running, how)
    running.wait()
    lost = [line for line in (folder / "said").read_text().splitlines() if "are missing" in line]
    there = sorted(str(path.relative_to(folder)) for path in traces(folder))
    return {"exit": running.returncode, "there": there, "said": lost[:1]}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.lprompt.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=6)
    parser.add_argument("--method", default="uce")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--base", default="demo")
    args = parser.parse_args()
    two, alone = (Path(tempfile.mkdtemp(prefix=f"launch-{name}-")) for name in ("two", "alone"))
    if args.base == "tiny":
        args.base = str(testing.save_tiny(two / "base"))
    for folder in (two, alone):
        (folder / "list.csv").write_text("\n".join(["name", *NAMES[: args.concepts]]) + "\n")
    told = {name: run(command(args, 2), two, how) for name, how in RUNS.items()}
    told["alone"] = run(command(args, 1), alone, "")
    same = bytes_of(two) == bytes_of(alone)
    print(json.dumps({**told, "files": len(bytes_of(alone)), "byte for byte the same": same}, indent=1))
    sys.exit(not same)


if __name__ == "__main__":
    main()
