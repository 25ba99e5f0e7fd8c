"""How long the program takes to start, as a ratio to importing what it is made of.

    python tests/benchmarks/start.py [COMMAND...]

Processor seconds of `conceptzap COMMAND --help` over those of `import typer, rich.console`, the
least of several starts of each, taken in turn so that a busy machine is busy for both. At most 1.6.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from conceptzap.registry import family

STARTS = 7
BARE = [sys.executable, "-c", "import typer, rich.console"]
TARGET = 1.6


def spent(command: list[str]) -> float:
    """Processor seconds of one process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = used.ru_utime + used.ru_stime
    subprocess.run(command, check=True, capture_output=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime - before


def main() -> None:
    names = sys.argv[1:] or ["", *family.files("cli")]
    for name in names:
        ours = [sys.executable, "-m", "conceptzap", *filter(None, [name]), "--help"]
        pairs = [(spent(BARE), spent(ours)) for _ in range(STARTS)]
        bare, mine = (min(times) for times in zip(*pairs, strict=True))
        sign = "" if mine <= TARGET * bare else f"  over {TARGET}"
        print(f"{name or 'conceptzap':12} {mine:.3f} s / {bare:.3f} s = {mine / bare:.2f}{sign}", flush=True)


if __name__ == "__main__":
    main()
