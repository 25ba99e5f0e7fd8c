"""The figures of docs/figures.md, made again: its blocks, one after the other, in one folder.

    python tests/benchmarks/readme.py [--blocks 1 3] [-o figures] [--list]

Hours of CPU for all. Each command is said, with its exit code and seconds; what a command says goes to
`<number>.log` in the folder. A command that was done is not done again, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks() -> list[list[str]]:
    """The commands of each block; what ends in a backslash, and a loop, is one command."""
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- figures: .*?-->\n```sh\n(.*?)```", text, re.DOTALL)
    whole = (re.sub(r"\\\n\s*", "", re.sub(r"(?ms)^for .*?^done$", _one_line, block)) for block in found)
    return [[line for line in block.splitlines() if line.strip()] for block in whole]


def _one_line(loop: re.Match[str]) -> str:
    first, *body, last = loop[0].splitlines()
    return f"{first} {'; '.join(line.strip() for line in body)}; {last}"


def run(number: str, command: str, folder: Path) -> int:
    """One command in the folder, by this Python and its `conceptzap`; its exit code."""
    done = folder / f"{number}.done"
    if done.exists():
        return 0
    python = f'{shlex.quote(sys.executable)} "$@"'
    shims = folder / ".bin"
    shims.mkdir(exist_ok=True)
    for name, line in (("python", python), ("conceptzap", python.replace('"$@"', '-m conceptzap "$@"'))):
        (shims / name).write_text(f"#!/bin/sh\nexec {line}\n")
        (shims / name).chmod(0o755)
    env = os.environ | {"PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"}
    with open(folder / f"{number}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(["sh", "-c", command], cwd=folder, env=env, stdout=log, stderr=log).returncode
    if not code:
        done.touch()
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="*", help="these alone, from 1")
    parser.add_argument("-o", "--output", type=Path, default=Path("figures"))
    parser.add_argument("--list", action="store_true", help="say the commands, do nothing")
    args = parser.parse_args()
    folder = args.output.absolute()
    if not args.list:
        folder.mkdir(exist_ok=True)
        if not (folder / "tests").exists():
            (folder / "tests").symlink_to(ROOT / "tests")  # the commands name scripts from the top
    failed = 0
    for place, block in enumerate(blocks(), 1):
        for step, command in enumerate(block if place in (args.blocks or [place]) else [], 1):
            began = time.monotonic()
            code = None if args.list else run(f"{place}-{step}", command, folder)
            failed += bool(code)
            spent = "" if code is None else f"[{code}, {time.monotonic() - began:.0f} s] "
            print(f"{place}-{step} {spent}{command}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
