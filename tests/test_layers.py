"""The house rules that a machine can check: imports point down, nothing dangerous is reachable."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import conceptzap
from conceptzap.registry import family

ROOT = Path(conceptzap.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
FAMILIES = ("methods", "attacks", "metrics", "judges", "exports", "imports")
# the house, from the roof down: a file may import its own floor and what lies below it
FLOORS = (
    ("__init__", "__main__", "cli"),
    ("playground",),
    ("terminal", "integrations"),
    ("api", "testing"),
    ("verbs",),
    ("page",),
    FAMILIES,
    ("redteam",),
    ("evaluation", "training", "trust"),
    ("runtime",),
    ("base", "format"),
    ("registry",),
    ("edit", "errors", "report", "result", "task", "words"),
)
# no torch, numpy, PIL or diffusers when these are imported
LIGHT = (
    "__init__", "__main__", "api", "cli", "edit", "errors", "report", "result", "task", "words", "terminal", "registry",
    "format.__init__", "format.atomic", "format.cache", "format.container", "format.layout", "format.lprompt",
    "format.naming", "format.remote", "format.schema", "format.tree", "format.typed", "evaluation.__init__", "evaluation.phrases",
    "evaluation.probes", "evaluation.verdict", "runtime.__init__",
    "training.__init__", "training.wordings", "trust.__init__", "trust.admission", "trust.attested", "trust.guard", "trust.lockfile", "trust.policy", "verbs.__init__",
    "verbs.concept_list", "verbs.doubts", "verbs.estimates", "verbs.exporting", "verbs.failing", "verbs.launched", "verbs.overlaps", "verbs.generating", "verbs.inspecting", "verbs.planning", "verbs.stacking", "verbs.tracking",
)  # fmt: skip
HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "safetensors", "accelerate", "scipy")
LONGEST_FILE, LONGEST_LINE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 400, 110, 60, 14


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module(path: Path) -> str:
    """`cli/erase.py` -> `cli.erase`; a package is called by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path) for path in FILES}


def top(name: str) -> str:
    return name.partition(".")[0]


@cache
def imports(path: Path, at_load: bool = False) -> set[str]:
    """Dotted names that a file imports, but for types; `at_load`: only when it is imported itself."""
    found: set[str] = set()
    for node in _running(tree(path), at_load):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _running(node: ast.AST, at_load: bool) -> Iterator[ast.AST]:
    """All nodes but those only a type checker reads; `at_load`: nor those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if at_load and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from _running(child, at_load)


@cache
def own(path: Path, at_load: bool = False) -> set[str]:
    """Modules of the package that a file imports, without the package's name."""
    names = {name for name in imports(path, at_load) if name.startswith("conceptzap.")}
    found = set()
    for name in names:
        name = name.removeprefix("conceptzap.")
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def floor(name: str) -> int:
    """The floor of a module, counted from the roof."""
    return next(number for number, rooms in enumerate(FLOORS) if top(name) in rooms)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_down(path: Path) -> None:
    name = module(path)
    if top(name) == "demo":
        return
    others = {other for other in own(path) if top(other) != "demo"}
    above = {other for other in others if floor(other) < floor(name)}
    assert not above, f"{name} imports {sorted(above)} from a layer above"


@pytest.mark.parametrize("name", FAMILIES)
def test_siblings_never_import_siblings(name: str) -> None:
    for path in family.files(name).values():
        others = {o for o in own(path) if top(o) in FAMILIES and o != module(path)}
        others -= {name}  # the package itself, where a family keeps what its members share
        assert not others, f"{module(path)} imports {sorted(others)}"


def test_commands_never_import_commands() -> None:
    for path in family.files("cli").values():
        others = {o for o in own(path) if top(o) == "cli" and not o.startswith("cli._")} - {"cli"}
        assert not others, f"{module(path)} imports {sorted(others)}"


def test_base_and_format_do_not_know_each_other() -> None:
    for name, other in (("base", "format"), ("format", "base")):
        for path in (path for path in FILES if top(module(path)) == name):
            assert not {o for o in own(path) if top(o) == other}, f"{module(path)} imports {other}"


def test_only_few_may_look_into_the_demo() -> None:
    allowed = ("api", "demo", "judges", "cli.demo", "cli._errors")
    for path in FILES:
        name = module(path)
        if name not in allowed and top(name) not in ("demo", "judges"):
            assert not {o for o in own(path) if top(o) == "demo"}, f"{name} imports the demo"


def test_a_demo_module_imports_values_only() -> None:
    """The built-in checkpoint can be rebuilt by itself; its own files and values are all it needs."""
    for path in (path for path in FILES if top(module(path)) == "demo"):
        above = {o for o in own(path) if top(o) != "demo" and floor(o) < floor("base")}
        assert not above, f"{module(path)} imports {sorted(above)}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_light_modules_import_nothing_heavy(path: Path) -> None:
    name = module(path) if path.name != "__init__.py" or path.parent == ROOT else f"{module(path)}.__init__"
    if name not in LIGHT and top(name) not in LIGHT:
        return
    heavy = {name for name in imports(path, at_load=True) if top(name) in HEAVY}
    assert not heavy, f"{module(path)} imports {sorted(heavy)} when it is loaded"


def test_no_method_is_named_outside_methods() -> None:
    """Nothing downstream may ask which method made a file; docstrings and help examples may say it."""
    names = set(family.members("methods"))
    for path in FILES:
        if top(module(path)) in ("methods", "demo"):
            continue
        docs = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and id(node) not in docs:
                assert node.value not in names, f"{module(path)}:{node.lineno} names {node.value!r}"


BARRED_CALLS = {"eval", "exec", "compile", "__import__"}
BARRED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
BARRED_METHODS = {"torch.load", "yaml.load", "os.system", "os.popen"}
BARRED_TRUE = {"allow_pickle", "shell", "trust_remote_code"}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_nothing_runs_code_from_data(path: Path) -> None:
    name = module(path)
    assert not {i for i in imports(path) if top(i) in BARRED_MODULES}, name
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in BARRED_CALLS | BARRED_METHODS, f"{name}:{node.lineno} {called}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert not (keyword.arg in BARRED_TRUE and value is True), f"{name}:{node.lineno}"


def test_the_scan_for_dangerous_calls_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\n")
    assert {i for i in imports(bad) if top(i) in BARRED_MODULES} == {"pickle"}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_and_lines_stay_readable(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_FILE, f"{module(path)} has {len(lines)} lines"
    long = [n for n, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
    assert not long, f"{module(path)} has lines over {LONGEST_LINE} characters: {long}"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_files_of_tests_ask_one_kind_of_question(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_FILE, f"{path.name} has {len(lines)} lines: split it by its questions"


def test_functions_stay_short() -> None:
    lengths = {
        f"{module(path)}.{node.name}": _body_length(node)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
    }
    long = {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION}
    median = sorted(lengths.values())[len(lengths) // 2]
    assert not long, f"functions over {LONGEST_FUNCTION} lines: {long}"
    assert median <= MEDIAN_FUNCTION, f"the median function has {median} lines"


def _body_length(node: ast.FunctionDef) -> int:
    """Lines of code and comments, without the signature and the docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (body[-1].end_lineno - body[0].lineno + 1) if body else 0


def test_every_module_says_what_it_is() -> None:
    for path in FILES:
        if path.name != "__main__.py" and path.read_text(encoding="utf-8").strip():
            assert ast.get_docstring(tree(path)), f"{module(path)} has no docstring"


def test_no_utils() -> None:
    bad = re.compile(r"(^|_)(utils?|helpers?|common|misc)$")
    assert not [module(path) for path in FILES if bad.search(path.stem)]
