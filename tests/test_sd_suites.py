"""The suites for Stable Diffusion as the papers run them, end to end: a tiny base, stub judges."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Answer, conceptzap
from erasures import write

from conceptzap.base import Base
from conceptzap.evaluation import suites
from conceptzap.page import report
from conceptzap.verbs.evaluating import read

pytestmark = pytest.mark.usefixtures("own_cache", "loaded_once")

# suite -> what is erased, what the papers print of it, the slices it asks in
SUITES = {
    "imagenette": ("church", {"ESR-1", "ESR-5", "PSR-1", "PSR-5", "E", "P", "H"},
                   {"erase/seen", "erase/held-out", "erase/synonym", "keep/unrelated"}),
    "unlearncanvas": ("Van Gogh", {"UA", "IRA", "CRA", "E", "P", "H"},
                      {"erase/seen", "keep/style", "keep/unrelated"}),
    "i2p": ("nudity", {"NER-0.3", "NER-0.5", "NER-0.6", "NER-0.7", "NER-0.8", "E"},
            {"erase/seen", "erase/held-out", "erase/synonym", "keep/unrelated"}),
    "artists": ("Van Gogh", {"ESR-1", "PSR-1", "UA", "IRA", "E", "P", "drift"},
                {"erase/seen", "erase/held-out", "erase/bare", "keep/style"}),
    "coco": ("Dog", {"drift", "CRA", "P", "validity"}, {"keep/unrelated", "keep/composed"}),
}  # fmt: skip


def evaluate(suite: str, judge: str, folder: Path, file: Path, output: Path) -> Answer:
    return conceptzap(
        "evaluate", file, "--base", folder, "--suite", suite, "--judge", f"stub_judges:{judge}",
        "--limit", 2, "--steps", 1, "-o", output, "--json",
    )  # fmt: skip


@pytest.mark.parametrize("suite", SUITES)
def test_it_runs_end_to_end(
    suite: str, sd1: Base, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concept, printed, slices = SUITES[suite]
    file = write(sd1, concept, tmp_path)
    answer = evaluate(suite, "turning", tiny_folder, file, tmp_path / "out")
    # what is attached erases nothing, and where a judge notices, the run says so
    assert answer.code == 0 or "not erased" in answer.json["error"]["message"], answer.err
    result = read(tmp_path / "out" / "result.json")
    assert printed <= {score.metric for score in result.scores}
    found = {line.partition(",")[0] for line in (tmp_path / "out" / "cells.csv").read_text().splitlines()}
    assert found == slices | {"slice"}
    about, _ = suites.load(suite)
    assert result.settings["guidance"] == about.guidance and result.settings["batch"] == about.batch
    if not about.erase:
        assert not any(" dog" in line for line in (tmp_path / "out" / "cells.csv").read_text().splitlines())
    sheets = {path.stem.replace("-", "/", 1) for path in (tmp_path / "out" / "images").iterdir()}
    assert sheets == slices
    monkeypatch.setattr(report, "_attended", lambda *_: ())  # of the same pictures, once is enough
    sees_nothing(evaluate(suite, "nothing", tiny_folder, file, tmp_path / "blind"), slices)


def sees_nothing(answer: Answer, slices: set[str]) -> None:
    """Of the same pictures: whatever was asked for counts as absent, before and after; no figure flatters."""
    assert answer.code == 0, answer.err
    scores = answer.json["scores"]
    asks = any(name.startswith("erase/") for name in slices)
    assert [score["value"] for name, score in scores.items() if name == "E"] == [0] * asks
    assert scores.get("P", {"value": 0})["value"] == 0
