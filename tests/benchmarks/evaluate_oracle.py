"""What a checkpoint that never knew a concept scores: the yardstick beside every erasure of it.

    python -m conceptzap.demo.recipe.build --without church --shipped-vae --work W
    python tests/benchmarks/evaluate_oracle.py church W/checkpoint-without-church --suite standard

Adds the scores of the checkpoint to `conceptzap/demo/oracle.json`; its weights stay outside.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from conceptzap.base import load_base
from conceptzap.evaluation import run
from conceptzap.evaluation.phrases import figure, headlines, interval, key, name
from conceptzap.format import atomic
from conceptzap.judges.demo import ORACLE
from conceptzap.terminal.progress import Progress
from conceptzap.verbs.evaluating import settle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("concept")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--base", default="demo")
    given = parser.parse_args()
    base, other = load_base(given.base), load_base(str(given.folder))
    experiment = settle(base, given.suite, [given.concept])
    result = run.evaluate_base(base, other, experiment, Progress()).result
    scores = {key(s.metric, s.slice): s.record() for s in result.scores if "label/" not in s.slice}
    record = {"base": result.base["digest"], "scores": {}}
    if ORACLE.is_file():
        known = json.loads(ORACLE.read_text(encoding="utf-8"))
        record["scores"] = known["scores"] if known["base"] == record["base"] else {}
    record["scores"][f"{given.suite}/{experiment.targets[0].name}"] = scores
    atomic.write_atomic(ORACLE, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode(), force=True)
    for score in headlines(result):
        print(f"{name(score):28} {figure(score):>9}  {interval(score)}  n = {score.n}")


if __name__ == "__main__":
    main()
