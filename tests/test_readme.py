"""The README's commands, run in order in an empty folder by the shell a user has."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
SCREEN, COLUMNS = 55, 110  # lines, characters: what a browser shows of a page
# what each command's comment, or the text around it, says will be there
NAMED = (
    "van-gogh.lprompt.safetensors", "van-gogh.png", "images", "church.lprompt.safetensors",
    "van-gogh+church.lprompt.safetensors", "uce.lprompt.safetensors", "uce.toml",
    "erased/model_index.json", "conceptzap.lock", "python-church.lprompt.safetensors",
    "church-0.png", "church-1.png", "erased.png", "bench/bench.html", "opt-outs", "van-gogh-card",
    "pipeline/model_index.json", "theirs.lprompt.safetensors",
)  # fmt: skip
SHELL = ("everyday", "many", "others")  # the blocks in the order of the page, before the one in Python


def block(name: str) -> str:
    """The code of the block behind the mark `<!-- run: name -->`."""
    return re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)[1]


def first_commands() -> str:
    """The line that sets everything up and the one that activates it, from `conceptzap` on."""
    first = r"^python3 -m venv .* && \.venv/bin/(conceptzap .*)\n\. \.venv/bin/activate && (conceptzap .*)$"
    (lines,) = re.findall(first, README, re.MULTILINE)
    return "\n".join(lines)


def test_every_block_is_run_or_says_why_not() -> None:
    marked = re.findall(r"(<!-- (?:run|not run|test command|figures).*?-->\n)?```(?:sh|python)\n", README)
    assert marked.count("") == 1, "the first commands alone stand without a mark"


def screens() -> dict[str, int]:
    """Lines that each part of the README takes, by its heading; pictures aside."""
    return {part.partition("\n")[0]: _lines(part) for part in re.split(r"(?m)^#{1,2} ", README)[1:]}


def _lines(part: str) -> int:
    """Of code one each; of the rest, its paragraphs joined, as many as it is wide, and their margins."""
    plain = re.sub(r"<!--.*?-->|!?\[([^]]*)\]\([^)]*\)", r"\1", part)
    code = "".join(re.findall(r"(?s)```\w*\n(.*?)```", plain))
    rest = re.sub(r"(?s)```.*?```", "", plain)
    flowing = re.sub(r"(?<=\S)\n(?=[^\n|-])", " ", rest)
    blocks = [line for line in flowing.splitlines() if line.strip()]
    margins = sum(not line.startswith(("|", "-")) for line in blocks)
    return code.count("\n") + sum(-(-len(line) // COLUMNS) for line in blocks) + margins


def test_every_part_is_one_screen() -> None:
    long = {title: lines for title, lines in screens().items() if lines > SCREEN}
    assert not long


def test_it_opens_with_what_a_user_sees() -> None:
    first, everyday, python, figures, *_ = screens()
    assert (first, everyday, python) == ("conceptzap", "Everyday commands", "From Python")
    assert figures == "What it does, in figures"
    opening = README.partition("\n## ")[0]
    assert opening.index("![") < opening.index("```sh") < opening.index(". .venv/bin/activate")


def test_the_figures_stand_apart() -> None:
    assert "<!-- figures" not in README and "docs/figures.md" in README
    assert set(re.findall(r"<!-- (\w+)[^>]*-->\n```sh\n", FIGURES)) == {"figures"}
    assert FIGURES.count("```sh") == FIGURES.count("<!-- figures")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    shim = tmp_path / "bin" / "conceptzap"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m conceptzap "$@"\n')
    shim.chmod(0o755)
    env = os.environ | {
        "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}",
        "CONCEPTZAP_CACHE": str(tmp_path / "cache"),
    }
    here = tmp_path / "empty"
    here.mkdir()
    shell = "\n".join(["set -e", first_commands(), *map(block, SHELL)])
    done = subprocess.run(["sh", "-c", shell], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    program = [sys.executable, "-c", block("python")]
    done = subprocess.run(program, cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [name for name in NAMED if not (here / name).exists()], sorted(os.listdir(here))


def test_a_script_runs_the_blocks_of_figures(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "tests" / "benchmarks" / "readme.py")]
    listed = subprocess.run([*program, "--list"], capture_output=True, text=True, check=True, cwd=tmp_path)
    commands = listed.stdout.splitlines()
    assert len({line.partition("-")[0] for line in commands}) == FIGURES.count("<!-- figures") >= 4
    assert all(re.match(r"\d+-\d+ (conceptzap|git|python|for) ", line) for line in commands)
    assert not list(tmp_path.iterdir())


def test_a_command_of_the_figures_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import readme

    assert readme.run("1-1", "conceptzap methods zap -q && echo x >> out", tmp_path) == 0
    assert readme.run("1-1", "conceptzap methods zap -q && echo x >> out", tmp_path) == 0
    assert readme.run("1-2", "conceptzap methods zpa", tmp_path) == 2
    assert (tmp_path / "out").read_text() == "x\n" and "steps" in (tmp_path / "1-1.log").read_text()
