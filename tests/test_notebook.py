"""The notebook's cells run in order, in an empty folder, on the built-in checkpoint."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import conceptzap
from conceptzap.evaluation import suites
from conceptzap.page import report, strength
from conceptzap.result import Settings
from conceptzap.verbs import erasing, generating

NOTEBOOK = Path(__file__).parents[1] / "examples" / "erase.ipynb"
BOOK = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
STEPS = 1


def run_all() -> list[Any]:
    """What the last expression of every cell of code comes to, None for those that end in none.

    Where a cell says how many steps its pictures take, they take few.
    """
    here: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(BOOK["cells"]):
        if cell["cell_type"] == "code":
            source = re.sub(r"num_inference_steps=\d+", f"num_inference_steps={STEPS}", "".join(cell["source"]))
            tree = ast.parse(source, f"cell {number}")
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"cell {number}", "exec"), here)  # noqa: S102
            value = compile(ast.Expression(last.value), f"cell {number}", "eval") if last else "None"
            shown.append(eval(value, here))  # noqa: S307
    return shown


def check(shown: list[Any], folder: Path) -> None:
    seen = [one for one in shown if one is not None]
    assert [type(one) for one in seen if isinstance(one, conceptzap.Picture)] == [conceptzap.Picture]
    assert sum(isinstance(one, Image.Image) for one in seen) == 4 == len(seen) - 1
    for name in ("van-gogh.lprompt.safetensors", "van-gogh.png", "erased.png", "measured/report.html"):
        assert (folder / name).is_file(), name


def test_it_runs_on_the_built_in_checkpoint(
    own_cache: Path, loaded_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call with what it is given there, and where that says nothing, with few pictures and steps."""
    for verb in (generating, erasing):
        monkeypatch.setattr(verb, "usual", lambda base: Settings(steps=STEPS))
    monkeypatch.setattr(report, "_attended", lambda *_: ())  # nothing here reads the page,
    monkeypatch.setattr(strength, "PROMPTS", 0)  # which is on the tiny base what it is here
    suite, world = suites.load("smoke")  # what `erase` ends with has its own number of steps
    monkeypatch.setattr(suites, "load", lambda name: (replace(suite, steps=2), world))
    fewer = {
        "erase": {"limit": 1, "overrides": {"keep_prompts": 40}}, "evaluate": {"limit": 1, "steps": STEPS},
    }  # fmt: skip
    for name, more in fewer.items():
        monkeypatch.setattr(conceptzap, name, partial(getattr(conceptzap, name), **more))
    monkeypatch.chdir(tmp_path)
    check(run_all(), tmp_path)


def test_it_is_a_notebook_without_what_a_run_left_behind() -> None:
    assert BOOK["nbformat"] == 4 and len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    code = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
