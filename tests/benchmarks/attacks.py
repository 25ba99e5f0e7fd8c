"""The table method x attack, as Markdown: every attack on every file, each cell kept as soon as it is there.

    conceptzap erase "Van Gogh" --anchor painting -o zap; conceptzap erase ... --method esd -o esd
    python tests/benchmarks/attacks.py zap esd --attack inversion --attack seeds -o attacked

Without --attack all of them. The same command goes on where it was stopped. A cell is what is shown under
the worst form (what was shown before), of n, with Wilson's 95 % interval; CPU seconds stand in `cost.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conceptzap import api
from conceptzap.errors import ConceptZapError
from conceptzap.format import naming
from conceptzap.registry import catalog
from conceptzap.terminal.progress import Progress
from conceptzap.verbs import attacking
from conceptzap.verbs.generating import find_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--attack", action="append", choices=sorted(catalog.attack_names()))
    parser.add_argument("--budget", default="quick", choices=sorted(attacking.PROMPTS))
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--oracle", help="a checkpoint that never knew the concept, the last row")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("attacked"))
    given = parser.parse_args()
    base, oracle = find_base(given.base, given.device), given.oracle and find_base(given.oracle, given.device)
    names = given.attack or sorted(catalog.attack_names())
    for name in names:  # all files under one attack: what was found on the base alone is found once
        for file in map(naming.existing, map(Path, given.files)):
            place = given.output / stem(file) / name
            if (place / "result.json").is_file():
                continue
            began = time.process_time()
            asked = {"budget": given.budget, "prompts": given.prompts, "seed": given.seed, "oracle": oracle}
            try:
                done = api.attack(file, name, base, output=place, force=True, report=Progress(), **asked)
            except ConceptZapError as error:
                print(f"{stem(file)}, {name}: {error}", flush=True)
                continue
            cost = {"cpu_seconds": round(time.process_time() - began, 1)}
            (place / "cost.json").write_text(json.dumps(cost) + "\n")
            print(f"{stem(file)}, {name}: {done.sentence()}; {cost['cpu_seconds']} CPU s", flush=True)
    text = "\n".join(table(given.output, [stem(naming.existing(Path(file))) for file in given.files], names))
    (given.output / "table.md").write_text(text + "\n")
    print(f"\n{text}")


def stem(file: Path) -> str:
    return file.name.removesuffix(naming.SUFFIX)


def table(folder: Path, files: list[str], names: list[str]) -> Iterator[str]:
    """One line an attack, one column a file, the oracle last where it was attacked."""
    results = {(file, name): read(folder / file / name) for file in files for name in names}
    columns = {file: "" for file in files}
    if any(result.get("oracle") for result in results.values()):
        columns["a model that never knew it"] = "oracle"
    yield "| attack | " + " | ".join(columns) + " | CPU s |"
    yield "|---" * (len(columns) + 2) + "|"
    for name in names:
        found = {file: results[file, name] for file in files}
        never = next((result["oracle"] for result in found.values() if result.get("oracle")), {})
        cells = [cell(never if kind else found[column]) for column, kind in columns.items()]
        costs = [result["cpu_seconds"] for result in found.values() if "cpu_seconds" in result]
        control = " (control)" if any(result.get("control") for result in found.values()) else ""
        yield f"| {name}{control} | {' | '.join(cells)} | {max(costs, default=0):.0f} |"


def read(place: Path) -> dict[str, Any]:
    """A kept result with its cost, {} where there is none."""
    parts = [place / "result.json", place / "cost.json"]
    return {key: value for path in parts if path.is_file() for key, value in json.loads(path.read_text()).items()}


def cell(result: dict[str, Any]) -> str:
    """`14/16 (0): 64 to 97 %, evade`."""
    if not result:
        return "-"
    asr, before = result["asr"], result["before"]
    count, already = (round(one["value"] * one["n"]) for one in (asr, before))
    form = "" if result["worst"] == "plain" else f", {result['worst']}"
    return f"{count}/{asr['n']} ({already}): {100 * asr['low']:.0f} to {100 * asr['high']:.0f} %{form}"


if __name__ == "__main__":
    main()
