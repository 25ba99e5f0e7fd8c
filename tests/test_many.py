"""`erase --from`: a list of concepts, stopped and gone on with, in one process or two, on a tiny random base."""

from __future__ import annotations

import shlex
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import Answer, conceptzap, refused
from process import Program
from test_cli_flow import closed_form

import conceptzap as package
from conceptzap import api
from conceptzap.base import Base
from conceptzap.edit import Header
from conceptzap.errors import Interrupted, MismatchError, ThresholdError
from conceptzap.evaluation.closing import Closing
from conceptzap.registry import family
from conceptzap.report import Report
from conceptzap.result import Score
from conceptzap.task import Task
from conceptzap.terminal import many as table
from conceptzap.verbs import concept_list, erasing, launched, many, planning
from conceptzap.verbs.launched import LostProcess
from conceptzap.verbs.many import ErasedAll, ErasedOne

pytestmark = pytest.mark.usefixtures("loaded_once")

SUFFIX = ".lprompt.safetensors"
NAMES = ("cat", "church", "horse", "tree")
LIST = """
[[concept]]
name = "cat"
anchor = "dog"
keep = ["horse", "church"]

[[concept]]
name = "church"
anchor = "house"

[[concept]]
name = "horse"

[[concept]]
name = "tree"
anchor = ""
"""


def words(base: Path, *more: object) -> list[str]:
    cheap = ("--set", "keep_prompts=12", "--anchor", "house", "--keep", "car")
    asked = ("erase", "--from", "list.toml", "--base", base, "--method", closed_form(), *cheap, *more)
    return [str(word) for word in asked]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the list, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.toml").write_text(LIST)
    return tmp_path


@pytest.fixture(scope="module")
def whole(loaded_once: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The list erased in one go."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("list.toml").write_text(LIST)
        return folder, conceptzap(*words(tiny_folder), "--json")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob(f"*{SUFFIX}")}


# what comes out


def test_a_file_each_and_their_stack(whole: tuple[Path, Answer]) -> None:
    folder, answer = whole
    assert answer.code == 0, answer.err
    told = answer.json
    assert set(told) == {"schema", "files", "failed", "stack", "scores", "seconds"}
    assert told["schema"] == "conceptzap.erase_all/1" and told["failed"] == []
    assert [one["concept"] for one in told["files"]] == list(NAMES)
    assert [one["anchor"] for one in told["files"]] == ["dog", "house", "house", ""]
    for one in told["files"]:
        path = Path(one["path"])
        assert path == folder / "list" / f"{one['concept']}{SUFFIX}" and path.stat().st_size == one["bytes"]
        assert package.inspect(path).digest == one["digest"] and not one["kept"] and one["seconds"] > 0
    kept = [package.inspect(one["path"]).header.made[0]["keep"] for one in told["files"]]
    assert kept == [["horse", "church"], ["car"], ["car"], ["car"]]
    by_hand = package.stack([one["path"] for one in told["files"]])
    assert package.load(told["stack"]["path"]) == by_hand and by_hand.digest == told["stack"]["digest"]
    assert told["stack"]["path"] == str(folder / f"list{SUFFIX}")
    assert sorted(files(folder)) == sorted([*(f"{name}{SUFFIX}" for name in NAMES), f"list{SUFFIX}"])


def test_a_file_is_the_one_that_erase_writes_alone(
    whole: tuple[Path, Answer], tiny_folder: Path, here: Path
) -> None:
    """Byte for byte, though here nothing is shared; by the command that a failed row is told with."""
    plans = conceptzap(*words(tiny_folder), "-n", "--json").json
    assert plans["schema"] == "conceptzap.plan_all/1" and len(plans["plans"]) == 4
    assert plans["output"] == str(here / f"list{SUFFIX}") and plans["folder"] == str(here / "list")
    asked = concept_list.resolve("list.toml", **request(tiny_folder))
    Path("list").mkdir()
    answer = conceptzap(*shlex.split(asked.plans[0].command())[1:])
    assert answer.code == 0, answer.err
    assert files(here) == {f"cat{SUFFIX}": files(whole[0])[f"cat{SUFFIX}"]}


def request(base: Path) -> dict[str, Any]:
    """The arguments of `words`, from Python."""
    return {
        "base": str(base), "method": closed_form(), "overrides": {"keep_prompts": "12"}, "anchors": ("house",),
        "keep": ("car",),
    }  # fmt: skip


def test_from_python_and_from_csv_it_is_the_same(
    whole: tuple[Path, Answer], tiny_folder: Path, here: Path
) -> None:
    rows: list[Any] = [{"name": "cat", "anchor": "dog", "keep": ["horse", "church"]}, "church"]
    given = {**request(tiny_folder), "anchors": "house", "report": Report()}
    done = package.erase_all(rows, **given, output="two")
    assert [one.digest for one in done.files] == [one["digest"] for one in whole[1].json["files"][:2]]
    assert done.stack and done.stack.path == Path(f"two{SUFFIX}") and done.scores == {}
    (here / "two.csv").write_text('\ufeffname,anchor,keep\ncat,dog,"horse; church"\n\nchurch,,\n', "utf-8")
    again = package.erase_all("two.csv", **given)
    assert all(one.kept for one in again.files) and again.stack and again.stack.digest == done.stack.digest


def test_the_table_has_a_line_for_each_and_the_command_of_what_failed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    rest = {"anchor": "", "kind": "object", "method": "m"}
    good = ErasedOne("cat", **rest, path=tmp_path / "cat", bytes=9, digest="f" * 64, left=(1, 2))
    bad = ErasedOne("dog", **rest, path=tmp_path / "dog", error={"message": "no luck"}, command="conceptzap x")
    table.told(ErasedAll((replace(good, kept=True), replace(good, concept="car"), bad), verdict="half"))
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "f" * 12 in lines["cat"] and "kept" in lines["cat"] and "gone from 1 of 2" in lines["cat"]
    assert "0.0 s" in lines["car"] and "failed" in lines["dog"]
    assert "dog: no luck; repeat it alone: conceptzap x" in err and "half" in err and "2 made, 1 kept" in err
    table.plans(concept_list.resolve(["cat"], output=tmp_path / "x", method=closed_form()).record())
    assert "cat" in capsys.readouterr().out


def test_what_nobody_chose_becomes_something_that_stays(sd1: Base, tmp_path: Path) -> None:
    """Nothing on the list is drawn in place of something on it; its command alone makes the same file."""
    (plan,) = concept_list.resolve(["cat"], output=tmp_path / "x", method=closed_form()).plans
    usual = many._job(sd1, concept_list.Row("cat", ""), plan, ["cat"]).task.anchors[0]
    rows = ["cat", {"name": str(usual), "anchor": "cat"}]
    asked = concept_list.resolve(rows, output=tmp_path / "x", method=closed_form())
    names = [row.name for row in asked.rows]
    jobs = [many._job(sd1, *pair, names) for pair in zip(asked.rows, asked.plans, strict=True)]
    assert jobs[0].task.anchors[0] not in (*names, None, "") and jobs[1].task.anchors == ("cat",)
    assert f"--anchor {jobs[0].task.anchors[0]}" in jobs[0].plan.command()
    again = planning.resolve("cat", anchors=jobs[0].task.anchors, method=closed_form())
    assert erasing.fitting_task(sd1, again, Report()) == jobs[0].task


def together() -> list[str]:
    return [name for name in family.members("methods") if hasattr(family.load("methods", name), "unsolved")]


@pytest.mark.parametrize("method", together())
def test_closed_forms_of_a_list_are_solved_together_and_are_those_of_each_alone(
    method: str, sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, self-tests and all; what goes wrong with one is told of one."""
    given = {"method": method, "overrides": {"keep_prompts": "12"}, "keep": ("car",), "base": sd1}
    rows = [{"name": "cat", "anchor": "dog"}, {"name": "church", "anchor": "house"}, "horse"]
    solved = many.solving.solved
    at_once: list[int] = []
    monkeypatch.setattr(many.solving, "solved", lambda some: at_once.append(len(some)) or solved(some))
    unsolved = many.erasing.unsolved

    def failing(plan: Any, base: Base, task: Task, report: Report) -> Any:
        if task.concepts == ("horse",):
            raise RuntimeError("no luck")
        return unsolved(plan, base, task, report)

    monkeypatch.setattr(many.erasing, "unsolved", failing)
    done = package.erase_all(rows, **given, anchors="house", limit=0, output=tmp_path / "x", report=Report())
    assert at_once == [2] and [one.concept for one in done.failed] == ["horse"] and done.stack is None
    for one, row in zip(done.files, rows[:2], strict=False):
        target = tmp_path / f"{one.concept}-alone"
        alone = package.erase(
            one.concept, **given, anchors=row["anchor"], preview=False, limit=0, output=target, report=Report()
        )
        assert alone.digest == one.digest and alone.path.read_bytes() == one.path.read_bytes()
    assert at_once == [2]


# stopped, failed, gone on with


def after(number: int, instead: Callable[[], Any]) -> Callable[..., Any]:
    """`erasing.erase` that does something else from its call `number` on."""
    calls: list[str] = []
    erase = many.erasing.erase

    def call(plan: Any, *rest: Any) -> Any:
        calls.append(plan.method)
        return instead() if len(calls) >= number else erase(plan, *rest)

    return call


def test_what_is_finished_is_not_made_again(
    whole: tuple[Path, Answer], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole[0])
    monkeypatch.setattr(many.erasing, "erase", None)
    before = files(whole[0])
    again = conceptzap(*words(tiny_folder), "--json")
    assert again.code == 0 and all(one["kept"] for one in again.json["files"])
    assert again.json["stack"] == whole[1].json["stack"] and files(whole[0]) == before


def test_a_stopped_run_goes_on_with_the_same_bytes(
    whole: tuple[Path, Answer], tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(many.erasing, "erase", after(3, stop))
        answer = conceptzap(*words(tiny_folder), "--json")
    assert answer.code == 143 and "2 of 4 concepts are missing: horse, tree" in answer.json["error"]["message"]
    assert not (here / f"list{SUFFIX}").exists()
    done = conceptzap(*words(tiny_folder), "--json")
    assert [one["kept"] for one in done.json["files"]] == [True, True, False, False]
    assert files(here) == files(whole[0])


@pytest.mark.parametrize("error", [Interrupted("stopped", "go on", 15), SystemExit(143), KeyboardInterrupt()])
def test_whatever_stops_a_run_says_what_is_missing(error: BaseException) -> None:
    with pytest.raises(Interrupted) as raised, launched.telling(lambda: list("abc"), 9, "cells"):
        raise error
    signum = "SIGINT" if isinstance(error, KeyboardInterrupt) else "SIGTERM"
    assert str(raised.value) == f"stopped by {signum}; 3 of 9 cells are missing: a, b, c"
    assert raised.value.exit_code == (130 if signum == "SIGINT" else 143) and "same command" in raised.value.hint
    with pytest.raises(LostProcess, match="gone; 25 of 30 cells are missing: 0, .*, 19 and 5 more"):
        with launched.telling(lambda: list(map(str, range(25))), 30, "cells"):
            raise LostProcess("gone")
    with pytest.raises(SystemExit), launched.telling(list, 1, "cells"):
        raise SystemExit(3)


def test_what_failed_is_told_with_its_command_and_the_others_are_made(
    whole: tuple[Path, Answer], tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(many.erasing, "erase", after(4, broken))
        answer = conceptzap(*words(tiny_folder), "--json")
    assert answer.code == 1
    (failed,) = answer.json["failed"]
    assert failed["concept"] == "tree" and failed["message"] == "no luck" and answer.json["stack"] is None
    assert answer.json["error"]["message"] == "1 of 4 concepts failed" and len(files(here)) == 3
    assert conceptzap(*shlex.split(failed["command"])[1:]).code == 0
    done = conceptzap(*words(tiny_folder), "--json")
    assert all(one["kept"] for one in done.json["files"]) and files(here) == files(whole[0])


@pytest.mark.parametrize("same", [True, False])
def test_a_training_that_was_killed_is_taken_up_where_it_is_of_this_plan(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = concept_list.resolve(["cat"], output=tmp_path / "x", method=closed_form()).plans
    resumed: list[bool] = []

    def erase(plan: Any, report: Report, resume: bool, base: Any, solved: Any = ()) -> None:
        resumed.append(resume)
        if resume and not same:
            raise MismatchError("the saved run differs in lr")

    monkeypatch.setattr(many.erasing, "erase", erase)
    many._erased(None, plan, Report())
    (plan.checkpoints / "1" / "step-000003").mkdir(parents=True)
    many._erased(None, plan, Report())
    assert resumed == ([False, True] if same else [False, True, False])


def test_a_file_that_its_own_figures_fail_is_told_of_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"leak": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 24}}
    error = many._not_erased(made(scores))
    assert error is not None and str(error) == "not erased: 50% of 24 pictures still show it"
    assert many._not_erased(made({})) is None
    assert many._not_erased(made({"leak": {**scores["leak"], "value": 0.2}})) is None


def made(scores: Any) -> Header:
    from samples import header

    return header(scores=scores)


def test_a_stack_that_still_shows_them_is_not_good_enough(
    whole: tuple[Path, Answer], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Closing({"leak": Score("leak", 0.5, 0.3, 0.7, 8)}, "half", shown={"cat": (2, 2), "tree": (0, 2)})
    monkeypatch.setattr(many, "closing", lambda *_: found)
    monkeypatch.chdir(whole[0])
    answer = conceptzap(*words(tiny_folder), "--json")
    assert answer.code == 7 and answer.json["stack"] == whole[1].json["stack"]
    assert "50% of 8 pictures of the stack" in answer.json["error"]["message"]
    left = [(one["shown"], one["pictures"]) for one in answer.json["files"]]
    assert left == [(2, 2), (None, None), (None, None), (0, 2)]
    assert conceptzap(*words(tiny_folder), "--limit", "0").code == 0, "nothing is measured"
    with pytest.raises(ThresholdError) as raised:
        api.erase_all("list.toml", **{**request(tiny_folder), "anchors": "house"}, report=Report())
    assert isinstance(raised.value.made, ErasedAll)


def test_what_others_made_is_not_overwritten(whole: tuple[Path, Answer], tiny_folder: Path, here: Path) -> None:
    (here / "list").mkdir()
    other = files(whole[0])[f"church{SUFFIX}"]
    (here / "list" / f"cat{SUFFIX}").write_bytes(other)
    refused(here, 2, "was made in another way", *words(tiny_folder))
    (here / f"list{SUFFIX}").write_bytes(other)
    refused(here, 2, "is no stack of these concepts", *words(tiny_folder))
    assert conceptzap(*words(tiny_folder), "--force").code == 0 and files(here) == files(whole[0])
    (here / "list" / f"cat{SUFFIX}").write_bytes(b"damaged")
    assert conceptzap(*words(tiny_folder)).code == 2
    (here / "plain").write_text("")
    refused(here, 2, "plain is not a folder", *words(tiny_folder), "-o", "plain")


# one run at a time, several processes


HOLDING = """
import time
from conceptzap.training.session import locked
from pathlib import Path
with locked(Path("list")):
    Path({held!r}).touch()
    time.sleep(600)
"""


def test_a_second_run_waits_and_a_dead_ones_lock_is_nobodys(
    whole: tuple[Path, Answer], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole[0])
    holding = Program(HOLDING.format(held=str(tmp_path / "held")))
    while holding.running and not (tmp_path / "held").exists():
        time.sleep(0.02)
    busy = conceptzap(*words(tiny_folder))
    assert holding.kill() == -signal.SIGKILL
    assert busy.code == 5 and "another run is" in busy.err
    assert conceptzap(*words(tiny_folder)).code == 0


DYING = """
import os
from conceptzap.verbs import many
erase = many.erasing.erase
made = []
def dying(*given):
    made.append(given)
    if os.environ["RANK"] == "1" and len(made) == 2:
        os._exit(9)
    return erase(*given)
many.erasing.erase = dying
"""


def test_two_processes_share_the_work_and_one_that_is_lost_is_finished_for(
    whole: tuple[Path, Answer], tiny_folder: Path, here: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    # what a launcher tells its processes
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", **meet}
    running = [Program(DYING, *words(tiny_folder), **told, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    ended = [one.wait() for one in running]
    said = [one.err for one in running]
    assert ended == [1, 9], said
    assert "a process of this run was lost; 1 of 4 concepts are missing: tree" in said[0]
    assert "1 of 4: cat" in said[0] and "3 of 4: horse" in said[1]
    assert len(files(here)) == 3
    assert conceptzap(*words(tiny_folder)).code == 0
    assert files(here) == files(whole[0])
