"""`bench`: methods by concepts by suites, cell by cell, stopped and taken up, on a tiny random base."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import faults, needs_axe
from command import Answer, conceptzap, contents
from evaluations import CHEAP, STUB
from process import Program
from test_cli_flow import closed_form

import conceptzap as package
from conceptzap import base as opened
from conceptzap.errors import Interrupted
from conceptzap.registry import catalog
from conceptzap.result import Result, Settings
from conceptzap.runtime import sampler
from conceptzap.training.lessons import Lesson
from conceptzap.verbs import benching

CLOSED = [m["name"] for m in catalog.methods() if m["cost"] == "closed form"]
KEEPING = {"rank", "keep_prompts"}  # settings that the quick ones have
QUICK = [n for n in CLOSED if {one["name"] for one in catalog.method(n)["settings"]} >= KEEPING][:2]
WORDS = ("--suite", "imagenette", *STUB, *CHEAP)
LOOK = Settings(steps=1, guidance=2.0)
FILES = {"folder", "json", "csv", "table", "page"}


@pytest.fixture(scope="module", autouse=True)
def quick(loaded_once: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A look at a random base takes one step, few prompts are kept; what was loaded or drawn stays for all."""
    kept = Lesson.kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lesson, "kept", lambda self, count: kept(self, min(count, 24)))
        patch.setenv("CONCEPTZAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("conceptzap.verbs.erasing.usual", lambda base: LOOK)
        patch.setattr(benching, "load_base", opened.load_base)
        yield


def bench(folder: Path, out: Path, *more: object, methods: list[str] = QUICK) -> Answer:
    asked = [word for name in methods for word in ("--method", name)]
    return conceptzap("bench", *asked, "--base", folder, *WORDS, "-o", out, *more)


CHURCH = ("--concept", "church:house")
BOTH = (*CHURCH, "--concept", "church:dog")


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """A bench of two methods on two concepts, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, bench(tiny_folder, out, *BOTH, "--json")


def same(one: Path, other: Path) -> None:
    """Everything that depends on no clock is the same, byte for byte."""
    assert (one / "bench.json").read_bytes() == (other / "bench.json").read_bytes()
    files = [
        {path.name: path.read_bytes() for path in (folder / "erasures").glob("*.safetensors")}
        for folder in (one, other)
    ]
    assert files[0] and files[0] == files[1]


# what comes out


def test_every_cell_is_measured_and_told(whole: tuple[Path, Answer]) -> None:
    out, answer = whole
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["schema"] == "conceptzap.bench/1" and set(found) == {"schema", "cells", *FILES}
    pairs = [(cell["method"], cell["concept"], cell["anchor"]) for cell in found["cells"]]
    assert pairs == [(m, c, a) for c, a in (("church", "house"), ("church", "dog")) for m in QUICK]
    for cell in found["cells"]:
        assert cell["error"] is None and cell["suite"] == "imagenette"
        assert cell["bytes"] == Path(cell["path"]).stat().st_size and cell["seconds"] > 0
        assert cell["peak_bytes"] > 10**8 and package.inspect(cell["path"]).digest == cell["digest"]
        assert {"E", "P", "H", "E [erase/synonym]"} <= set(cell["scores"])
        assert set(cell["scores"]["E"]) == {"value", "low", "high", "n"}


def test_the_record_holds_results_that_can_be_compared(whole: tuple[Path, Answer]) -> None:
    record = json.loads((whole[0] / "bench.json").read_text())
    results = [Result.from_record(cell["result"]) for cell in record["cells"]]
    assert [list(one.subject["concepts"]) for one in results] == [["church"]] * 4
    assert len({one.probes for one in results}) == 1, "all are asked the same"
    assert "seconds" not in json.dumps(record) and "peak" not in json.dumps(record)


def test_the_table_has_a_line_for_every_cell_with_limits_n_and_costs(whole: tuple[Path, Answer]) -> None:
    out, answer = whole
    lines = list(csv.DictReader((out / "bench.csv").read_text().splitlines()))
    for line, cell in zip(lines, answer.json["cells"], strict=True):
        score = cell["scores"]["E"]
        assert [float(line[name]) for name in ("E", "E low", "E high", "E n")] == list(score.values())
        assert float(line["seconds"]) == cell["seconds"] and int(line["bytes"]) == cell["bytes"]
        assert int(line["peak bytes"]) == cell["peak_bytes"] and line["error"] == ""


def test_the_table_for_a_readme_has_a_line_for_every_method_and_every_cell(whole: tuple[Path, Answer]) -> None:
    out, answer = whole
    rows = [line for line in (out / "bench.md").read_text().splitlines() if line.startswith("| `")]
    cells, methods = answer.json["cells"], rows[: len(QUICK)]
    assert len(rows) == len(QUICK) + len(cells) and "&" not in "".join(rows)
    assert [row.count("|") for row in methods] == [methods[0].count("|")] * len(QUICK)
    for row, cell in zip(rows[len(QUICK) :], cells, strict=True):
        shown = f"{100 * cell['scores']['E']['value']:.1f} %"
        assert f"`{cell['method']}` | {cell['concept']} |" in row and shown in row


def test_the_request_is_a_file_that_gives_the_same_bench(
    whole: tuple[Path, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench.toml` alone, in another folder; nothing is drawn again, for pictures are shared."""
    assert conceptzap("bench", whole[0] / "bench.toml", "-o", tmp_path / "again").code == 0
    same(whole[0], tmp_path / "again")


class Tags(HTMLParser):
    """Counts of tags; the texts of dots and of links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_shows_e_against_p_and_links_to_what_lies_beside_it(whole: tuple[Path, Answer]) -> None:
    page = (whole[0] / "bench.html").read_text()
    tags = Tags(page).tags
    assert sum(tag == "circle" for tag, _ in tags) == 4 and sum(tag == "svg" for tag, _ in tags) == 1
    links = [attrs["href"] for tag, attrs in tags if tag == "a"]
    assert len(links) == 4 + 4 and all((whole[0] / link).is_file() for link in links)
    assert not [tag for tag, attrs in tags if tag == "script" or "src" in attrs]
    for text in ("erased (E)", "kept (P)", "its synonyms", "n = 6", "seconds", "peak memory", *QUICK):
        assert text in page


@needs_axe
def test_nothing_keeps_anybody_from_reading_it(whole: tuple[Path, Answer], tmp_path: Path) -> None:
    assert faults((whole[0] / "bench.html").read_text(), tmp_path) == []


def test_attacks_are_columns(whole: tuple[Path, Answer], tiny_folder: Path, tmp_path: Path) -> None:
    """Added to a finished bench, they alone are carried out; each has a page of its own."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = contents(out / "cells")
    answer = bench(tiny_folder, out, *BOTH, "--attack", "random-tokens", "--force", "--json")
    assert answer.code == 0, answer
    assert contents(out / "cells").items() >= before.items()
    attacked = [cell for cell in answer.json["cells"] if cell["suite"] == "attack-random-tokens"]
    assert len(attacked) == 4 and all(cell["scores"]["ASR"]["n"] for cell in attacked)
    links = [attrs["href"] for tag, attrs in Tags((out / "bench.html").read_text()).tags if tag == "a"]
    pages = {link for link in links if link.startswith("attacks/")}
    assert len(pages) == 4 and all((out / page).is_file() for page in pages)
    lines = list(csv.DictReader((out / "bench.csv").read_text().splitlines()))
    assert sum(bool(line["ASR"]) for line in lines) == 4 and len(lines) == 8


# what is wrong with one cell


def test_a_cell_that_fails_is_told_and_the_others_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    """A concept that the suite does not know is trained by nobody; the rest is measured, exit 1."""
    out = tmp_path / "out"
    answer = bench(tiny_folder, out, "--concept", "horse:dog", *CHURCH, methods=QUICK[:1])
    assert answer.code == 1 and "1 of 2 cells failed" in answer.err
    assert "has no prompts for 'horse'" in answer.err and "church" in answer.out
    assert [path.name for path in (out / "erasures").glob("*.safetensors")] == [
        f"{QUICK[0]}--church--house.lprompt.safetensors"
    ]
    spoken = bench(tiny_folder, out, "--concept", "horse:dog", *CHURCH, "--json", methods=QUICK[:1])
    bad, good = spoken.json["cells"]
    assert spoken.code == spoken.json["error"]["code"] == 1 and spoken.err.count("error") == 0
    assert bad["error"]["code"] == 2 and bad["scores"] == {} and good["error"] is None
    for name in ("bench.csv", "bench.html"):
        assert "has no prompts" in (out / name).read_text()


def test_whatever_a_method_raises_is_its_cells_error(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is a bug, and memory that runs out; the next run takes exactly those up."""
    erase, asked = benching.erasing.erase, []

    def fails(plan: Any, *rest: Any) -> Any:
        asked.append(plan.method)
        if len(asked) == 1:
            raise KeyError("x")
        if len(asked) == 2:
            raise MemoryError
        return erase(plan, *rest)

    monkeypatch.setattr(benching.erasing, "erase", fails)
    out = tmp_path / "out"
    found = bench(tiny_folder, out, *BOTH, "--json")
    errors = [cell["error"] for cell in found.json["cells"]]
    assert found.code == 1 and errors[2:] == [None, None]
    assert [(one["kind"], one["code"]) for one in errors[:2]] == [("KeyError", 1), ("MemoryError", 5)]
    assert bench(tiny_folder, out, *BOTH).code == 0 and asked == [*QUICK, *QUICK, *QUICK]


# stopped and taken up


def counted(monkeypatch: pytest.MonkeyPatch, made: list[str], erase: Any) -> None:
    """Note the method of every erasure that is made from now on."""

    def noted(plan: Any, *rest: Any) -> Any:
        made.append(plan.method)
        return erase(plan, *rest)

    monkeypatch.setattr(benching.erasing, "erase", noted)


def test_what_is_stopped_goes_on_and_ends_with_the_same_bytes(
    whole: tuple[Path, Answer], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second erasure: the first cell is kept as it is, seconds included."""
    erase, out = benching.erasing.erase, tmp_path / "out"
    made: list[str] = []

    def stopped(plan: Any, *rest: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(plan.method)
        return erase(plan, *rest)

    monkeypatch.setattr(benching.erasing, "erase", stopped)
    assert bench(tiny_folder, out, *BOTH).code == 130
    assert not (out / "bench.json").exists() and len(list((out / "cells").iterdir())) == 1
    before = contents(out / "cells")
    counted(monkeypatch, made, erase)
    assert bench(tiny_folder, out, *BOTH).code == 0
    assert made == [*QUICK, *QUICK], "the first was not made again"
    assert contents(out / "cells").items() >= before.items()
    same(out, whole[0])


def test_a_training_that_asks_to_be_resumed_stops_the_bench(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise Interrupted("stopped", "go on", 15)

    monkeypatch.setattr(benching.erasing, "erase", stopped)
    assert bench(tiny_folder, tmp_path / "out", *CHURCH).code == 143


FAST = """
import conceptzap.verbs.erasing as erasing
from conceptzap.result import Settings
from conceptzap.training.lessons import Lesson
kept = Lesson.kept
erasing.usual = lambda base: Settings(steps=1, guidance=2.0)
Lesson.kept = lambda self, count: kept(self, min(count, 24))
"""


def words(folder: Path, out: Path) -> list[str]:
    """The bench of the fixture as a command line."""
    asked = [word for name in QUICK for word in ("--method", name)]
    return ["bench", *asked, "--base", str(folder), *map(str, (*WORDS, *BOTH)), "-o", str(out)]


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    whole: tuple[Path, Answer], tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    running = Program(FAST, *words(tiny_folder, out))
    while running.running and not any(out.glob("cells/*.json")):
        time.sleep(0.02)
    running.kill()
    assert not (out / "bench.json").exists()
    assert conceptzap(*words(tiny_folder, out)).code == 0
    same(out, whole[0])


def test_a_finished_bench_is_told_again_and_draws_nothing(
    whole: tuple[Path, Answer], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to draw")

    monkeypatch.setattr(sampler, "denoise", never)
    before = {name: data for name, (_, data) in contents(whole[0]).items()}
    again = bench(tiny_folder, whole[0], *BOTH, "--json")
    assert again.code == 0 and again.json == whole[1].json
    assert {name: data for name, (_, data) in contents(whole[0]).items()} == before


def test_another_bench_needs_force_and_keeps_what_still_fits(
    whole: tuple[Path, Answer], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = whole[0]
    before = contents(out)
    less = bench(tiny_folder, out, *CHURCH)
    assert less.code == 2 and "differs in concepts" in less.error and contents(out) == before
    made: list[str] = []
    counted(monkeypatch, made, benching.erasing.erase)
    forced = bench(tiny_folder, out, *CHURCH, "--force", "--json")
    assert forced.code == 0 and not made and len(forced.json["cells"]) == 2
    settings = ("--set", f"{QUICK[0]}.keep_prompts=20")
    assert bench(tiny_folder, out, *CHURCH, *settings, "--force").code == 0
    assert made == QUICK[:1], "its settings changed, the other's did not"
    assert bench(tiny_folder, out, *BOTH, "--force").code == 0


def test_a_damaged_cell_is_measured_again(whole: tuple[Path, Answer], tiny_folder: Path) -> None:
    out = whole[0]
    (cell, *_) = sorted((out / "cells").iterdir())
    data, record = cell.read_bytes(), (out / "bench.json").read_bytes()
    for damaged in (b"", data[:-9], b"[]", b'{"budget": 1}', data.replace(b'"digest"', b'"digset"')):
        cell.write_bytes(damaged)
        assert bench(tiny_folder, out, *BOTH).code == 0
        assert cell.read_bytes() == data and (out / "bench.json").read_bytes() == record


def test_a_folder_that_is_somebody_elses(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.csv").write_text("mine")
    assert "exists" in bench(tiny_folder, tmp_path, *CHURCH).error
    assert "is not a folder" in bench(tiny_folder, tmp_path / "bench.csv", *CHURCH).error
    assert (tmp_path / "bench.csv").read_text() == "mine"


# among processes


def test_each_process_takes_its_share(
    whole: tuple[Path, Answer], tiny_folder: Path, tmp_path: Path
) -> None:
    """Two of them: every cell is made once, one process tells, the bytes are the same."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    # what a launcher tells its processes
    here = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", **meet}
    asked = (*words(tiny_folder, tmp_path / "out"), "--json")
    running = [Program(FAST, *asked, **here, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    assert [one.wait() for one in running] == [0, 0], [one.err for one in running]
    out, err = ("".join(getattr(one, name) for one in running) for name in ("out", "err"))
    assert out.count("\n") == 1 and len(json.loads(out)["cells"]) == 4
    assert err.count(" of 4: ") == 4
    same(tmp_path / "out", whole[0])


def test_the_toml_in_the_folder_is_what_was_asked(whole: tuple[Path, Answer], tiny_folder: Path) -> None:
    table = tomllib.loads((whole[0] / "bench.toml").read_text())
    assert table["methods"] == QUICK and table["base"] == str(tiny_folder) and table["limit"] == 2
    assert closed_form() in QUICK
