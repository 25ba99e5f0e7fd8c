"""The plug-in for the `eval-unlearn` benchmark: seeds are its own, batches do not change pictures."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from erasures import write
from PIL import Image

from conceptzap.base import Base
from conceptzap.errors import MismatchError
from conceptzap.testing import save_tiny
from conceptzap.verbs.eval_unlearn import ConceptzapTechnique

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(sd1: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("plugin")
    file = write(sd1, "church", folder)
    return {"lprompts": [str(file)], "base": str(save_tiny(folder / "base")), "steps": 1}


def test_batches_do_not_change_what_is_drawn(config: dict[str, object]) -> None:
    whole = ConceptzapTechnique(**config).generate(["a cat", "a dog", "a cat"], seed=None)
    parts = ConceptzapTechnique(**config)
    split = [*parts.generate(["a cat", "a dog"], seed=None), *parts.generate(["a cat"], seed=None)]
    assert all(isinstance(one, Image.Image) for one in whole)
    for one, other in zip(whole, split, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert not np.array_equal(np.asarray(whole[0]), np.asarray(whole[2])), "each prompt has its seed"


def test_a_file_of_another_architecture_is_refused(
    sdxl: Base, config: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError):
        ConceptzapTechnique(**{**config, "lprompts": [str(write(sdxl, "church", tmp_path))]})


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["eval_unlearn.techniques"]
    assert declared == {"conceptzap": "conceptzap.verbs.eval_unlearn:ConceptzapTechnique"}


def test_the_real_runner_draws_with_it(config: dict[str, object], tmp_path: Path) -> None:
    types = pytest.importorskip(
        "eval_unlearn.types", reason="EVAL-UNLEARN IS NOT INSTALLED: the plug-in is not tested with it"
    )
    from eval_unlearn.registry import get_technique, register_metric
    from eval_unlearn.runners.single_benchmark_runner import SingleBenchmarkRunner

    class Brightness:
        def __init__(self) -> None:
            self.means: list[float] = []

        def load_dataset(self) -> list[object]:
            return [types.Dataset(["a cat", "a dog"], {"source": "stub"}) for _ in range(2)]

        def update(self, images: list[Image.Image], prompts: list[str], metadata: object) -> None:
            assert len(images) == len(prompts)
            self.means += [float(np.asarray(image).mean()) for image in images]

        def compute(self) -> object:
            return types.MetricResult("brightness", float(np.mean(self.means)), {})

    register_metric("brightness")(Brightness)
    runner = SingleBenchmarkRunner("conceptzap", "brightness", config, {}, str(tmp_path))
    assert get_technique("conceptzap") is ConceptzapTechnique, "found by its entry point"
    told = runner.run()["metric_result"]
    assert told["name"] == "brightness" and 0 < told["value"] < 255
    reports = [json.loads(path.read_text()) for path in tmp_path.rglob("*report.json")]
    assert reports and len(list(tmp_path.rglob("*.png"))) == 4
