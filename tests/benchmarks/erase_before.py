"""How long `erase "Van Gogh" --anchor painting` takes beside an older checkout of this repository.

    git clone . ../old && git -C ../old checkout 214f6b3
    python tests/benchmarks/erase_before.py ../old

Both are run in turn on one thread, each in a process and with a cache of its own, as whole commands from
Python's start to the last file. Seconds are of the CPU, which a busy machine leaves alone as far as it can;
the ratio is of the least of each. What is found is kept in the folder and not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
RUN = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1));"
    "runpy.run_module('conceptzap', run_name='__main__', alter_sys=True)"
)
COMMAND = ("erase", "Van Gogh", "--anchor", "painting", "--force")
PLAIN = ["--harden", "none"]  # which an older one does not know, and is


def seconds(checkout: Path, folder: Path, more: list[str]) -> float:
    """CPU seconds of one `erase` by the package in a checkout, its children's included."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    env = os.environ | {"CONCEPTZAP_CACHE": str(folder / "cache")}
    env |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", RUN, str(checkout), *COMMAND, *more]
    with open(folder / "log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, check=False, cwd=folder, env=env, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"{checkout}: exit code {done.returncode}, see {folder / 'log'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder of the older checkout")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build-before"))
    parser.add_argument("--more", nargs="*", default=[], help="options for both, such as --method=uce")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    kept = args.work.absolute() / "seconds.json"
    found: dict[str, list[float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for turn in range(args.rounds):
        sides = (("now", HERE, PLAIN), ("before", args.old.absolute(), []))
        for name, checkout, own in sides:
            took = found.setdefault(name, [])
            if len(took) <= turn:
                took.append(round(seconds(checkout, args.work.absolute() / name, args.more + own), 1))
                kept.write_text(json.dumps(found) + "\n")
                print(name, took[-1], "CPU s", flush=True)
    print(json.dumps(found | {"ratio": round(min(found["now"]) / min(found["before"]), 3)}))


if __name__ == "__main__":
    main()
