"""What a notebook and a type checker see."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
from erasures import nudge

import conceptzap
from conceptzap import api, report
from conceptzap.errors import UsageError
from conceptzap.format.pictures import read_text
from conceptzap.testing import save_tiny, tiny
from conceptzap.verbs import planning

LOOK = {"steps": 1, "guidance": 1.0}
USER = Path(__file__).with_name("user.py")
WRONG = "wrong: int = conceptzap.load(3.5)"  # two errors, so that it is seen that errors are seen
UNTYPED = "torch diffusers transformers numpy PIL safetensors accelerate huggingface_hub rich tqdm jinja2"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    save_tiny(folder / "base")
    conceptzap.save(nudge(tiny("sd1"), "church"), folder / "church")
    return folder


def one(world: Path, **more: object) -> conceptzap.Picture:
    (picture,) = conceptzap.generate("a church", **{"base": tiny("sd1"), **LOOK, **more})
    return picture


# pictures


def test_a_picture_shows_saves_and_names_itself(world: Path, tmp_path: Path) -> None:
    picture = one(world, erasures=world / "church")
    assert np.array_equal(np.asarray(picture.image), picture.array)
    path = picture.save(tmp_path / "a.png")
    assert path.read_bytes() == picture._repr_png_() and read_text(path) == dict(picture.text)
    assert re.fullmatch(r"Picture\('a church', seed 0, \d+ x \d+ px, changed by 1 of 1\)", repr(picture))
    with pytest.raises(UsageError, match="exists"):
        picture.save(path)
    assert picture.save(path, force=True) == path


def test_the_example_of_the_package_uses_what_there_is() -> None:
    (code,) = re.findall(r"\n\n((?:    .*\n|\n)+)", conceptzap.__doc__ or "")
    compile(textwrap.dedent(code), "docstring", "exec")
    called = set(re.findall(r"conceptzap\.(\w+)", code))
    assert called <= set(conceptzap.__all__) and hasattr(conceptzap.Picture, "save")


# what may stand for an erasure, and for a base


def test_one_erasure_is_as_good_as_a_list(world: Path) -> None:
    path = world / "church"
    whole, half = one(world, erasures=[path]), one(world, erasures=[(path, 0.5)])
    for same in (path, str(path), conceptzap.load(path), (path, 1)):
        assert np.array_equal(one(world, erasures=same).array, whole.array)
    assert np.array_equal(one(world, erasures=(path, 0.5)).array, half.array)


def test_whatever_is_a_base(world: Path) -> None:
    here = tiny("sd1")
    expected = one(world, base=here).array
    for base in (world / "base", str(world / "base"), here.pipeline()):
        assert np.array_equal(one(world, base=base).array, expected)
    with pytest.raises(UsageError, match="a base cannot be made of an int"):
        one(world, base=3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": "3"}, "steps='3' is not a whole number"),
        ({"steps": 2.5}, "steps=2.5 is not a whole number"),
        ({"guidance": "4"}, "guidance='4' is not a number"),
        ({"seed": "0"}, "seed='0' is not a whole number"),
        ({"count": 1.0}, "count=1.0 is not a whole number"),
        ({"batch": True}, "batch=True is not a whole number"),
        ({"prompts": [3]}, "the prompt '3' is no text"),
        ({"erasures": ("x", "1")}, "no such file: x|strength"),
        ({"erasures": [("x", "1")]}, "strength '1' is out of range"),
    ],
)
def test_a_value_of_another_kind_is_answered(bad: dict[str, object], message: str) -> None:
    with pytest.raises(conceptzap.ConceptZapError, match=message):
        conceptzap.generate(**{"prompts": "a cat", **bad})


# what is said


def test_what_is_warned_of_reaches_whoever_called(world: Path) -> None:
    with pytest.warns(UserWarning, match="another checkpoint") as heard:
        list(conceptzap.generate("a cat", erasures=world / "church", base=tiny("sd1", seed=1), **LOOK))
    assert {Path(warning.filename) for warning in heard} == {Path(__file__)}


def test_a_report_of_one_s_own_is_heard_instead(world: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw = {"base": tiny("sd1", seed=1), "report": conceptzap.Report(), **LOOK}
        list(conceptzap.generate("a cat", erasures=world / "church", **draw))


def test_bars_count(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "AFTER", 0.0)
    assert list(conceptzap.Bars().count("abc", 3, "reading")) == ["a", "b", "c"]
    assert "reading" in capsys.readouterr().err


def test_a_hint_is_part_of_the_traceback() -> None:
    with pytest.raises(UsageError) as error:
        conceptzap.generate([])
    assert error.value.__notes__ == [f"hint: {error.value.hint}"]


def test_erase_says_what_it_takes() -> None:
    ours = inspect.signature(conceptzap.erase).parameters
    planned = inspect.signature(planning.resolve).parameters
    assert set(ours) == set(planned) | {"resume", "report"}
    assert set(inspect.signature(conceptzap.plan).parameters) == set(planned) | {"report"}
    for verb in (conceptzap.erase, conceptzap.plan):
        given = inspect.signature(verb).parameters
        assert {n: given[n].default for n in planned} == {n: p.default for n, p in planned.items()}


def test_every_verb_names_what_it_takes() -> None:
    """`help()` shows parameters and defaults: no verb hides some behind `**options`."""
    verbs = {name: getattr(api, name) for name in vars(api) if not name.startswith("_")}
    for name, verb in verbs.items():
        if inspect.isfunction(verb):
            kinds = {param.kind for param in inspect.signature(verb).parameters.values()}
            assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, name
            assert verb.__doc__, name


def test_a_pipeline_of_the_demo() -> None:
    assert conceptzap.demo_pipeline().unet.config.sample_size


# types


ROOT = Path(conceptzap.__file__).parents[1]
CONFIGS = {
    "mypy": "[mypy]\nstrict = True\nfollow_imports = silent\ncache_dir = /dev/null\n"
    f"[mypy-{','.join(f'{name}.*' for name in UNTYPED.split())}]\nfollow_imports = skip\n",
    "pyright": json.dumps({"include": ["user.py"], "extraPaths": [str(ROOT)],
                           "useLibraryCodeForTypes": False, "reportMissingModuleSource": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("checker", CONFIGS)
def test_a_type_checker_knows_every_verb(checker: str, tmp_path: Path) -> None:
    """Strictly, the libraries left out that say nothing of their types or take minutes to read."""
    if not importlib.util.find_spec(checker):
        pytest.skip(f"{checker} is not installed: pip install -e '.[dev]'")
    script = USER.read_text()
    (tmp_path / "user.py").write_text(f"{script}{WRONG}\n")
    (tmp_path / "mypy.ini").write_text(CONFIGS["mypy"])
    (tmp_path / "pyrightconfig.json").write_text(CONFIGS["pyright"])
    words = {"mypy": ["user.py"], "pyright": ["--pythonpath", sys.executable]}
    done = subprocess.run(
        [sys.executable, "-m", checker, *words[checker]], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    found = re.findall(r"user\.py:(\d+)(?::\d+)?:? (?:- )?error: (.*)", done.stdout)
    assert {int(line) for line, _ in found} == {script.count("\n") + 1}, done.stdout + done.stderr
    assert len(found) == 2, done.stdout


def test_the_script_uses_every_verb() -> None:
    used = set(re.findall(r"conceptzap\.(\w+)", USER.read_text()))
    verbs = {name for name, home in conceptzap._HOME.items() if home == "api"}
    assert verbs <= used <= set(conceptzap.__all__)


def test_types_and_names_agree() -> None:
    """What a type checker is told is there is there, under the name that is public."""
    source = Path(conceptzap.__file__).read_text()
    pairs = re.findall(r"from conceptzap\.([\w.]+) import (\w+) as \2\n", source)
    told = {name: home for home, name in pairs}
    assert told == conceptzap._HOME and set(told) == set(conceptzap.__all__) - {"__version__"}
