"""Several processes of one launch: `evaluate` and `attack` share what is drawn and come to the same results.

`bench` among processes is in test_bench.py, `erase --from`, and a process that is lost, in test_many.py.
"""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from command import conceptzap
from evaluations import CHEAP, STUB
from process import Program

from conceptzap.errors import ConceptZapError
from conceptzap.evaluation import cached
from conceptzap.report import Report
from conceptzap.verbs import launched
from conceptzap.verbs.launched import LostProcess, Team

COUNTING = """
import json, sys
from conceptzap import cli
from conceptzap.evaluation.cached import CachedSampler
draw, drawn, main = CachedSampler._draw, [], cli.main
CachedSampler._draw = lambda self, probes: drawn.append(len(probes)) or draw(self, probes)
def several(words):
    codes = []
    for one in json.loads(words[0]):
        codes.append(main(one))
        print("drawn", sum(drawn), file=sys.stderr)
    return max(codes)
cli.main = several
"""


def commands(church: Path, base: Path, out: Path) -> list[list[str]]:
    """An evaluation that is not good enough and an attack, each to a folder of its own."""
    suite = ("--suite", "imagenette", *STUB)
    asked = [
        ("evaluate", church, "--base", base, *suite, *CHEAP, "-o", out / "e", "--json"),
        ("attack", church, "--attack", "random-tokens", "--base", base, *suite, "--steps", 1, "--prompts", 3,
         "--batch", 1, "--set", "tries=1", "-o", out / "a", "--json"),
    ]  # fmt: skip
    return [[str(word) for word in words] for words in asked]


def results(out: Path) -> list[Any]:
    found = [json.loads((out / name / "result.json").read_text()) for name in "ea"]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in found]


def test_two_processes_share_what_is_drawn_and_find_the_same(
    church: Path, tiny_folder: Path, tmp_path: Path, own_cache: Path
) -> None:
    alone, both = (commands(church, tiny_folder, tmp_path / name) for name in ("alone", "both"))
    (tmp_path / "alone").mkdir()
    (tmp_path / "both").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        codes = [conceptzap(*words).code for words in alone]
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    # what a launcher tells its processes
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", **meet}
    told["CONCEPTZAP_CACHE"] = str(tmp_path / "shared")
    running = [Program(COUNTING, json.dumps(both), **told, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    ended = [one.wait() for one in running]
    said = [(one.out, one.err) for one in running]
    assert codes == [7, 0] and ended == [7, 0], said
    assert said[0][0].count("\n") == 2 and said[1][0] == "", "one of them tells"
    assert results(tmp_path / "both") == results(tmp_path / "alone")
    drawn = [[int(n) for n in re.findall(r"^drawn (\d+)", err, re.M)] for _, err in said]
    assert all(min(counts) > 0 and counts[1] > counts[0] for counts in drawn), "both draw, in each command"
    assert {p.name for p in own_cache.rglob("*.png")} == {p.name for p in (tmp_path / "shared").rglob("*.png")}


def test_alone_all_is_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team("cpu")
    assert team.share("ab") == [(1, "a"), (2, "b")] and team.gather([3]) == [3] and team.leads
    done: list[int] = []
    with launched.drawing(team):
        cached.ahead([lambda: done.append(1)], "drawing", Report())
    assert done == [], "what is read next is drawn there"
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not launched.leads()
    assert launched.leads()


def test_a_lost_process_is_an_error_that_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    def closed(items: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    team = Team("cpu")
    team.state = object()  # type: ignore[assignment]
    monkeypatch.setattr(accelerate.utils, "gather_object", closed)
    with pytest.raises(LostProcess) as raised:
        team.wait()
    assert isinstance(raised.value, ConceptZapError) and "same command again" in raised.value.hint
