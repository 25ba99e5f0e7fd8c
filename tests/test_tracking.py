"""What a training leaves for whoever follows it: losses for trackers, samples along the way."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import conceptzap
from PIL import Image

from conceptzap.errors import UsageError
from conceptzap.verbs import planning, tracking

PLAN = {"concepts": ["cat"], "seed": 3, "prediction": None, "config": {"lr": 0.5, "steps": 4}}
EVENTS = [SimpleNamespace(step=n, total=4, terms={"erase": 1 / n}) for n in range(1, 5)]


def sheet() -> np.ndarray:
    return np.zeros((8, 8, 3), np.uint8)


def test_losses_and_samples(tmp_path: Path) -> None:
    with tracking.Log(tmp_path / "logs", ("jsonl",), 2, PLAN) as log:
        assert list(log.follow(EVENTS, sheet)) == EVENTS
        assert list(log.follow(EVENTS[:1], None)) == EVENTS[:1]
    lines = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["config"] == {"concepts": '["cat"]', "seed": 3, "prediction": "null",
                                  "lr": 0.5, "steps": 4}  # fmt: skip
    assert lines[1:5] == [{"step": n, "erase": 1 / n} for n in range(1, 5)]
    assert lines[5:] == [{"step": 1, "2/erase": 1}]
    samples = sorted((tmp_path / "logs" / "samples").iterdir())
    assert [path.name for path in samples] == ["000002.png", "000004.png"]
    assert Image.open(samples[0]).size == (8, 8)


def test_a_run_that_goes_on_adds_to_its_log(tmp_path: Path) -> None:
    for _ in range(2):
        with tracking.Log(tmp_path, ("jsonl",), 0, PLAN) as log:
            list(log.follow(EVENTS[:1], None))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_nothing_is_left_where_nothing_is_asked_for(tmp_path: Path) -> None:
    with tracking.Log(tmp_path / "logs", (), 0, PLAN) as log:
        assert list(log.follow(EVENTS, sheet)) == EVENTS
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard(tmp_path: Path) -> None:
    with tracking.Log(tmp_path, ("tensorboard",), 2, PLAN) as log:
        list(log.follow(EVENTS, sheet))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_trackers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no tracker is called 'wandv'"):
        tracking.check(["wandv"])
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "nowhere_to_be_found")
    with pytest.raises(UsageError, match="wandb is not installed"):
        tracking.check(["jsonl", "wandb"])
    assert tracking.check(["jsonl", "jsonl"]) == ("jsonl",)
    assert conceptzap("erase", "cat", "-n", "--log-with", "x").code == 2
    assert conceptzap("erase", "cat", "-n", "--sample-every", "-1").code == 2


def test_a_stopped_run_goes_on_with_its_trackers(tmp_path: Path) -> None:
    plan = planning.resolve("cat", log_with="jsonl", sample_every=5, output=tmp_path / "cat")
    assert plan.logs == tmp_path / "cat.logs"
    assert "--log-with jsonl --sample-every 5" in plan.resume_command()
