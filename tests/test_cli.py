"""The command line's own manners: help, streams, exit codes, lists, config files."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from command import conceptzap
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptzap import cli
from conceptzap.cli import _options
from conceptzap.errors import ConceptZapError, UsageError
from conceptzap.registry import catalog, config, family

COMMANDS = list(family.files("cli"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(code: str, *words: str, **kwargs: object) -> subprocess.Popen[str]:
    """The program as a process of its own, after `code`."""
    start = f"{code}\nimport sys\nfrom conceptzap.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", start, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


# help


def test_alone_it_shows_its_help() -> None:
    answer = conceptzap()
    assert answer.code == 0 and answer.err == ""
    assert answer.out == conceptzap("--help").out == conceptzap("-h").out
    assert all(f"\n  {name} " in answer.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_leads_with_two_examples(name: str) -> None:
    answer = conceptzap(name, "--help")
    assert answer.code == 0
    before = answer.out.partition("\nOptions:")[0]
    assert before.count(f"\n    conceptzap {name}") == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    _, _, listing = conceptzap(name, "--help").out.partition("\nOptions:\n")
    options = re.findall(r"^  -.*(?:\n {10,}.*)*", listing, flags=re.MULTILINE)
    assert options
    for option in options:
        assert re.search(r"\S {2,}\S|\n +\S", option.strip()), option


def test_an_option_without_its_value_points_at_the_command_s_help() -> None:
    assert conceptzap("erase", "--from").error.endswith("try `conceptzap erase --help`")


def test_every_default_is_said_in_one_way() -> None:
    """`[default: ...]`, whether typer says it or we do; and the words are those of the field."""
    for name in COMMANDS:
        text = " ".join(conceptzap(name, "--help").out.split())
        ends = re.findall(r"\.  ?\[([^\]]+)\]", text)
        assert all(end.startswith(("default: ", "required")) for end in ends), (name, ends)
        assert not re.search(r"\b(slices?|legs?|mends?|mended)\b", text), name


def test_commands_are_listed_by_use() -> None:
    assert set(cli.ORDER) == set(COMMANDS)


def test_every_setting_of_every_method_and_attack_is_explained() -> None:
    for one in catalog.methods():
        for setting in catalog.method(one["name"])["settings"]:
            assert setting["note"], (one["name"], setting["name"])
    for one in catalog.attacks():
        for setting in catalog.attack(one["name"])["settings"]:
            assert setting["note"] and "(" not in setting["default"], (one["name"], setting["name"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_line_of_the_list_of_commands_fits(name: str) -> None:
    line = next(x for x in conceptzap("--help").out.splitlines() if x.startswith(f"  {name} "))
    assert not line.endswith("...")


def test_version() -> None:
    answer = conceptzap("--version")
    assert re.fullmatch(r"conceptzap \d+\.\d+\.\d+ \(torch .+, diffusers .+, python .+\)\n", answer.out)


# errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["erasee"], "did you mean 'erase'"),
        (["erase", "cat", "--stepss", "3"], "--steps"),
        (["erase"], "no concept given"),
        (["generate", "a cat", "--seed", "1.5"], "--seed"),
        (["generate", "a cat", "--seed", "x"], "'--seed': not a whole number"),
        (["generate", "a cat", "--guidance", "x"], "'--guidance': not a number"),
        (["stack"], "missing argument 'file'"),
        (["methods", "kpopp"], "no method is called"),
        (["presets", "stile"], "did you mean style"),
        (["erase", "cat", "--set", "steps"], "not key=value"),
    ],
)
def test_usage_errors(words: list[str], message: str, here: Path) -> None:
    answer = conceptzap(*words)
    assert answer.code == 2
    assert message in answer.error.lower()
    spoken = conceptzap(*words, "--json")
    assert spoken.code == 2 and spoken.err == ""
    error = spoken.json["error"]
    assert set(error) == {"code", "kind", "message", "hint"}
    assert (error["code"], error["kind"]) == (2, "UsageError")
    assert error["hint"]
    assert not list(here.iterdir())


def test_options_are_never_abbreviated(here: Path) -> None:
    assert conceptzap("erase", "cat", "--forc").code == 2


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("conceptzap.registry.catalog.methods", fail)


@pytest.mark.parametrize(
    "kind",
    [k for k in vars(__import__("conceptzap.errors", fromlist=["*"])).values() if isinstance(k, type)],
)
def test_every_error_of_ours_has_its_code(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if not issubclass(kind, ConceptZapError):
        return
    failing(monkeypatch, kind("it\nbroke \x1b[31m", "mend it"))
    answer = conceptzap("methods")
    assert answer.code == kind("").exit_code
    assert answer.error == "it broke \\x1b[31m; mend it"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyError("x"), 1, "this is a bug in conceptzap: KeyError: 'x'; please report it"),
        (MemoryError(), 5, "out of memory"),
        (OSError(28, "No space left on device", "/x"), 5, "No space left on device: /x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "terminated"),
    ],
)
def test_other_exceptions(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    answer = conceptzap("methods")
    assert answer.code == code and message in answer.error
    spoken = conceptzap("methods", "--json")
    assert (spoken.code, spoken.json["error"]["code"]) == (code, code)


def test_a_traceback_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyError("x"))
    for value in ("", "0"):
        monkeypatch.setenv("CONCEPTZAP_DEBUG", value)
        assert "Traceback" not in conceptzap("methods").err
    asked = [conceptzap("--debug", "methods"), conceptzap("methods", "--debug")]
    monkeypatch.setenv("CONCEPTZAP_DEBUG", "1")
    for answer in (*asked, conceptzap("methods")):
        assert "Traceback" in answer.err and answer.err.splitlines()[-1].startswith("error: ")


# streams and signals


def test_a_pipe_that_closes_is_no_error() -> None:
    slow = "import conceptzap.registry.catalog as c, time\nc.presets = lambda: time.sleep(1) or []"
    done = program(slow, "presets")
    done.stdout.close()
    assert done.wait() == 141
    assert done.stderr.read() in ("", "all of one: conceptzap presets NAME\n")


def test_closed_streams_do_no_harm() -> None:
    command = f"{sys.executable} -m conceptzap methods >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", command], cwd=Path(cli.__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_have_their_exit_codes(signum: int, code: int) -> None:
    wait = (
        "import conceptzap.registry.catalog as c, sys, time\n"
        "c.methods = lambda: print('ready', file=sys.stderr, flush=True) or time.sleep(60)"
    )
    process = program(wait, "methods")
    assert process.stderr.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(signum)
    assert process.wait(10) == code and time.monotonic() - begun < 5
    assert process.stderr.read().count("\n") == 1


# lists, erasures, config files


def test_lists_come_from_files_too(here: Path) -> None:
    (here / "words.txt").write_bytes("\ufeffMonet\r\n# a remark\r\n\r\n  pixel art\r\n".encode())
    assert _options.words(["a, b", "@words.txt", "@@me"]) == ["a, b", "Monet", "pixel art", "@me"]
    with pytest.raises(UsageError, match="cannot read nowhere.txt"):
        _options.words(["@nowhere.txt"])
    (here / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        _options.words(["@bad.txt"])


def test_with_takes_a_strength(here: Path) -> None:
    (here / "a:0.5").touch()
    (here / "b").touch()
    assert _options.erasure("b") == (Path("b"), 1.0)
    assert _options.erasure("b:0.25") == (Path("b"), 0.25)
    assert _options.erasure("a:0.5") == (Path("a:0.5"), 1.0)
    assert _options.erasure("a:0.5:2") == (Path("a:0.5"), 2.0)
    assert _options.erasure("c:x") == (Path("c:x"), 1.0)


@pytest.mark.parametrize("strength", ["nan", "inf", "-0.1", "2.01", "x", ""])
def test_a_strength_out_of_range_is_refused(strength: str, here: Path) -> None:
    (here / "b").touch()
    with pytest.raises(UsageError, match="strength"):
        _options.erasure(f"b:{strength}")


GIVEN = {"anchor": [], "set": {}, "seed": None, "method": None}
DEFAULTS = {"seed": 0}


def test_flags_over_config_over_defaults(here: Path) -> None:
    (here / "c.toml").write_text('anchor = ["painting"]\nseed = 3\n[set]\nsteps = 5\nlr = 0.1\n')
    merged = _options.layered(here / "c.toml", {**GIVEN, "seed": 7, "set": {"lr": "1"}}, DEFAULTS)
    assert merged == {
        "anchor": ["painting"], "set": {"steps": 5, "lr": "1"}, "seed": 7, "method": None,
    }  # fmt: skip
    assert _options.layered(None, GIVEN, DEFAULTS)["seed"] == 0
    assert _options.layered(here / "c.toml", GIVEN, DEFAULTS)["seed"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = 3", "did you mean seed"),
        ("seed = true", "whole number"),
        ('seed = "3"', "whole number"),
        ("anchor = 1", "list of texts"),
        ("anchor = [1]", "list of texts"),
        ("set = 1", "table"),
        ("seed = = 3", "is not TOML"),
    ],
)
def test_a_config_file_that_is_wrong_says_where(text: str, message: str, here: Path) -> None:
    (here / "c.toml").write_text(text)
    answer = conceptzap("erase", "cat", "--config", "c.toml")
    assert answer.code == 2 and message in answer.error and "c.toml" in answer.error


@pytest.mark.parametrize(
    ("text", "line"),
    [("seed = 3\n\nsed = 4", 3), ("[sed]\na = 1", 1), ('"sed" = 1', 1), ("# sed\nsed.a = 1", 2)],
)
def test_a_key_that_is_unknown_is_shown_by_its_line(text: str, line: int, here: Path) -> None:
    (here / "c.toml").write_text(text)
    assert f"c.toml:{line}: unknown key 'sed'" in conceptzap("erase", "cat", "--config", "c.toml").error


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.one_of(
    TEXTS, st.lists(TEXTS), st.booleans(), st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
PLAIN = st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), VALUES)


@settings(deadline=None)  # a busy machine is no wrong answer
@given(PLAIN, PLAIN)
def test_what_is_saved_is_what_is_read(table: dict[str, object], inner: dict[str, object]) -> None:
    table = {**table, "set": inner}
    assert tomllib.loads(config.to_toml(table).decode()) == table


def test_a_name_that_no_config_file_can_say_is_refused_before_any_work(here: Path) -> None:
    answer = conceptzap("erase", "cat", "--base", "./no\udcff", "--save-config", "c.toml")
    assert answer.code == 2 and "not UTF-8" in answer.error and not list(here.iterdir())
