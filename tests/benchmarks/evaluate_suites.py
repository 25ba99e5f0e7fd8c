"""How long the suites take on this machine, and that a killed run ends the same.

    python tests/benchmarks/evaluate_suites.py van-gogh.lprompt.safetensors --suite quick --suite standard

Each suite runs through the command line with an empty cache, is killed once on the way, goes on, and
is compared byte for byte with a run that was left alone. Prints one line a suite.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(file: Path, suite: str, folder: Path, name: str, cache: str, kill_after: float = 0.0) -> float:
    """Seconds of one run into `folder/name`; with `kill_after` it is ended by SIGKILL then."""
    words = [sys.executable, "-m", "conceptzap", "evaluate", str(file)]
    words += ["--suite", suite, "-o", str(folder / name)]
    began = time.monotonic()
    process = subprocess.Popen(words, env={**os.environ, "CONCEPTZAP_CACHE": str(folder / cache)})
    if kill_after:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
    elif process.wait():
        raise SystemExit(f"evaluate ended with {process.returncode}")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--suite", action="append", dest="suites")
    given = parser.parse_args()
    for suite in given.suites or ["quick"]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            whole = run(given.file, suite, folder, "whole", "cache-1")
            run(given.file, suite, folder, "again", "cache-2", kill_after=whole / 2)
            rest = run(given.file, suite, folder, "again", "cache-2")
            same = all(
                (folder / "whole" / name).read_bytes() == (folder / "again" / name).read_bytes()
                for name in ("result.json", "cells.csv", "report.html")
            )
        print(f"{suite}: {whole:.0f} s; killed at half, {rest:.0f} s more; "
              f"{'identical' if same else 'NOT IDENTICAL'}")


if __name__ == "__main__":
    main()
