"""The README and docs/ say what is there: their commands, names and tree are held against the program."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer

import conceptzap
from conceptzap import cli
from conceptzap.registry import config, family

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/figures.md")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = typer.main.get_command(cli.build()).commands
PIP = ("pip", "install")
CHOICES = {
    "--method": list(family.members("methods")),
    "--preset": config.preset_names(),
    "--suite": config.preset_names("suites"),
}


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    text = "\n".join(PAGES.values())
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the shell blocks as words, without comments."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"&&|;", _without_comment(line))]
    return [words for part in parts if (words := shlex.split(part))]


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line)


def program(words: list[str]) -> str:
    """The name of what a command runs, without its folder."""
    return words[0].rpartition("/")[2]


OURS = [words[1:] for words in commands() if program(words) == "conceptzap"]
MODULES = [words[2:] for words in commands() if words[1:2] == ["-m"] and "python" in words[0]]
SCRIPTS = [words[1:] for words in commands() if "python" in words[0] and words[1].endswith(".py")]
INSTALLED = [words for words in commands() if (program(words), *words[1:2]) == PIP]


def test_nothing_is_left_to_fill_in() -> None:
    for text in PAGES.values():
        assert not re.findall(r"@@\w*@@|TODO|FIXME|TBD", text)


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_its_commands_parse(words: list[str]) -> None:
    name, *rest = words
    if name != "--version" and name != "--help":
        assert name in COMMANDS
        COMMANDS[name].make_context(name, list(rest))
    for option, value in zip(words, words[1:], strict=False):
        assert value in CHOICES.get(option, [value]), f"{option} {value}"


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_its_modules_run(words: list[str]) -> None:
    spec = importlib.util.find_spec(words[0])
    assert spec is not None and spec.origin
    if words[0].startswith("conceptzap"):
        _knows_options(Path(spec.origin), words)


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_its_scripts_are_there(words: list[str]) -> None:
    _knows_options(ROOT / words[0], words)


def _knows_options(script: Path, words: list[str]) -> None:
    source = script.read_text(encoding="utf-8")
    for word in words:
        assert not word.startswith("-") or f'"{word}"' in source, f"{script.name} has no {word}"


@pytest.mark.parametrize("words", INSTALLED, ids=" ".join)
def test_its_extras_exist(words: list[str]) -> None:
    extras = re.findall(r"\[([\w,-]+)\]", " ".join(words))
    named = {extra for group in extras for extra in group.split(",")}
    assert named <= set(PROJECT["project"]["optional-dependencies"])


def test_it_leads_with_the_one_command() -> None:
    first = [words for words in commands() if program(words) == "conceptzap"][0]
    assert first[1:] == ["erase", "Van Gogh", "--anchor", "painting"]


def test_its_python_uses_names_that_are_there() -> None:
    assert blocks("python")
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "conceptzap" or node.attr in conceptzap.__all__


@pytest.mark.parametrize("name", family.members("methods"))
def test_every_method_is_named(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", family.files("cli"))
def test_every_command_is_shown(name: str) -> None:
    assert any(words[:1] == [name] for words in OURS) or f"`conceptzap {name}`" in README


LINKS = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^):]+)\)", text)]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_what_it_links_to_is_there(page: str, link: str) -> None:
    name, _, heading = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    titles = re.findall(r"(?m)^#+ (.*)", target.read_text(encoding="utf-8")) if heading else ()
    assert not heading or heading in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}


# the tree

ENDINGS = "py|toml|md|json|png|typed|safetensors"
NAME = re.compile(rf"(?<!\S)[\w.*-]+(?:/[\w.*-]+)*(?:/|\.(?:{ENDINGS}))(?!\S)")


def tree() -> list[tuple[Path, str]]:
    """The names in the annotated tree, each with the folder it is said to lie in.

    A folder opens its line and ends in a slash; what is indented below it, or follows on its line,
    lies in it.
    """
    found = []
    above: list[tuple[int, Path]] = [(-1, ROOT)]
    section = README.partition("## The tree")[2]
    drawing = re.search(r"^```\w*\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for line in drawing[1].splitlines() if drawing else ():
        plain = re.sub("[│├└─]", " ", line)
        depth = len(plain) - len(plain.lstrip())
        above = [one for one in above if one[0] < depth]
        folder = above[-1][1]
        for index, name in enumerate(NAME.findall(plain)):
            found.append((folder, name))
            if name.endswith("/") and index == 0:
                folder = folder / name
                above.append((depth, folder))
    return found


def test_the_tree_names_what_is_there() -> None:
    named = tree()
    assert len(named) > 20
    assert not [name for folder, name in named if not list(folder.glob(name.rstrip("/")))]


def test_the_tree_names_every_folder_of_the_package() -> None:
    named = {(folder / name).resolve() for folder, name in tree()}
    package = ROOT / "conceptzap"
    real = {path.parent for path in package.glob("*/*") if "__pycache__" not in path.parts}
    assert not [str(path) for path in real if path not in named]


# the test command, the wheel


def test_continuous_integration_runs_its_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (line,) = [line for line in script.splitlines() if line.startswith("command=")]
    shell = ["sh", "-euc", f'{line}\nprintf %s "$command"']
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"python3 .*pytest.*", done.stdout)


def test_a_wheel_holds_every_file_and_the_presets(tmp_path: Path) -> None:
    """Built as pip builds it; what git tracks of the package and of `presets/` is inside."""
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    inside = set(zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "conceptzap").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {f"conceptzap/{p.relative_to(ROOT)}" for p in (ROOT / "presets").rglob("*.toml")}
    assert not sorted(wanted - inside)


def test_presets_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path) -> None:
    package = tmp_path / "conceptzap"
    shutil.copytree(ROOT / "conceptzap", package, ignore=shutil.ignore_patterns("demo", "*.pyc"))
    for place in (tmp_path / "presets", package / "presets"):
        shutil.copytree(ROOT / "presets", place)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom conceptzap.registry import config\n"
        code += "print(config.PRESETS, config.preset('style')['kind'])"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(place), "style"]
        shutil.rmtree(place)
