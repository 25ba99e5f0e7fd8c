"""The report: one file that needs nothing, with everything in it, and its grids there in a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from command import conceptzap
from erasures import nudge
from PIL import Image
from test_attention import learned

from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure
from conceptzap.evaluation.phrases import HEADLINES, SLICES, about
from conceptzap.page.figures import text
from conceptzap.page.samples import SHOWN
from conceptzap.trust import canary
from conceptzap.verbs.evaluating import read

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--force-color-profile=srgb", "--enable-logging=stderr", "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1300,6000",
)  # fmt: skip
SIDE, CELL = 16, 8  # pixels of a picture of the tiny base, and of each of them on the page
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="NO CHROMIUM IS INSTALLED: the report is not looked at in a browser"
)


def with_tokens(base: Base) -> Erasure:
    """An erasure of `church` with learned tokens."""
    made = nudge(base, "church")
    edits: tuple[Edit, ...] = tuple(sorted((*made.edits, learned(base)), key=lambda edit: edit.name))
    sites = [site for edit in edits for site in edit.sites]
    tested = canary.make(base, edits, "a photo of a church")
    header = {**vars(made.header), "base": base.reference(sites), "canary": tested}
    return format.seal(Erasure(type(made.header)(**header), edits))


@pytest.fixture(scope="module")
def out(sd1: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick suite, every slice of it, with the built-in judges on the tiny base's pictures."""
    folder = tmp_path_factory.mktemp("report")
    format.save(with_tokens(sd1), folder / "church.lprompt.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCEPTZAP_CACHE", str(folder / "cache"))
        answer = conceptzap(
            "evaluate", folder / "church.lprompt.safetensors", "--base", tiny_folder, "--suite", "quick",
            "--limit", 16, "--steps", 2, "-o", folder / "out",
        )  # fmt: skip
    assert answer.code == 0, answer.err
    return folder / "out"


@pytest.fixture(scope="module")
def page(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading."""
    return page.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]


def grids(page: str) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Title -> the pictures of its base row and of its erased row."""
    found = {}
    for part in section(page, "Same seed, before and after").split("<h3>")[1:]:
        title = html.unescape(part.partition("<span")[0])
        rows = [re.findall(r"base64,([^\"]+)", row) for row in part.split("<tr>")[2:4]]
        found[title] = tuple([_decoded(data) for data in row] for row in rows)
    return found


def _decoded(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def codes(path: Path) -> np.ndarray:
    """The colours of a picture in a file, each as one number [h, w]."""
    return _codes(np.asarray(Image.open(path).convert("RGB")))


def _codes(picture: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def places(shot: np.ndarray, picture: np.ndarray, cell: int) -> set[tuple[int, int]]:
    """Where (y, x) a picture stands in a screenshot, each of its pixels `cell` wide; corners are round."""
    wanted = _codes(picture)
    high, wide = (shot.shape[axis] - cell * SIDE + 1 for axis in (0, 1))
    inside = [(y, x) for y in range(2, SIDE - 2) for x in range(2, SIDE - 2)]
    found: np.ndarray | None = None
    for y, x in inside:
        top, left = cell * y + cell // 2, cell * x + cell // 2
        if found is None:
            found = np.argwhere(shot[top : top + high, left : left + wide] == wanted[y, x])
        rows, columns = found.T
        found = found[shot[rows + top, columns + left] == wanted[y, x]]
    return {(int(row), int(column)) for row, column in found}


# -- what is in it --------------------------------------------------------------------------------


def test_it_fetches_nothing_and_runs_nothing(page: str) -> None:
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image/png;base64,)", page)
    plain = re.sub(r"base64,[^\"]*", "", page)
    assert "://" not in plain and "url(" not in plain and "@import" not in plain
    assert "<script" not in page and "<link" not in page
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page


def test_its_summary_has_figures_with_intervals(page: str, out: Path) -> None:
    result = read(out / "result.json")
    for metric in ("E", "P", "H", "Leak@1", "Leak@20", "validity", "drift", "identical"):
        score = result.score(metric)
        card = page.partition(f'<div class="card"><div>{metric} · ')[2].partition('<div class="card">')[0]
        low, high = (
            f"{limit:.3g}" if metric == "drift" else f"{100 * limit:.1f} %"
            for limit in (score.low, score.high)
        )
        assert f"95 %: {low} – {high} · n = {score.n}" in card, metric
    for leg in result.failed:
        assert f"<b>{leg['leg']} fails</b>" in page


@pytest.mark.parametrize(
    "slice",
    ["erase/seen", "erase/held-out", "erase/synonym", "erase/crossed", "erase/composed", "erase/sealed",
     "keep/neighbour", "keep/unrelated", "keep/style", "keep/composed"],
)  # fmt: skip
def test_its_grids_show_the_same_seeds_before_and_after(slice: str, page: str, out: Path) -> None:
    before, after = grids(page)[SLICES[slice]]
    asked = sum(line.startswith(f"{slice},") for line in (out / "cells.csv").read_text().splitlines())
    assert len(before) == len(after) == min(SHOWN, asked) > 0
    sheet = codes(out / "images" / f"{slice.replace('/', '-')}.png")
    assert {one.shape for one in (*before, *after)} == {(SIDE, SIDE, 3)}
    assert places(sheet, before[0], 1) and places(sheet, after[0], 1), "the sheet has them too"


def test_its_bars_are_of_every_concept_and_slice(page: str, out: Path) -> None:
    bars, result = section(page, "Concept by concept"), read(out / "result.json")
    labels = [score.slice.partition("/")[2] for score in result.scores if score.metric == "right after"]
    for name in ("church", *filter(None, labels)):
        assert f'<div class="row"><span>{name}</span><div class="bar">' in bars, name
    assert bars.count('<div class="bar">') == len([*filter(None, labels)]) + sum(
        score.metric == "E" and bool(score.slice) for score in result.scores
    )


def test_it_says_what_the_judges_confuse(page: str) -> None:
    seen = section(page, "What the judges see")
    assert "church is seen as" in seen and "Kept, but now mistaken" in seen
    shares = [int(share) for share in re.findall(r'<td class="n">(\d+) %</td>', seen)]
    assert 90 < sum(shares[::2]) <= 102, "the ten most frequent labels of the base's pictures"


def test_it_shows_attention_of_words_and_of_learned_tokens(page: str) -> None:
    shown = section(page, "Where it attends")
    assert shown.count('alt="attention of the concept&#x27;s words"') == 2 * 4
    assert shown.count('alt="attention of learned tokens"') == 4
    shares = [float(share) for share in re.findall(r"([\d.]+) %</td>", shown)]
    assert len(shares) == 12 and all(0 < share < 100 for share in shares)


def test_it_says_how_it_was_measured(page: str, out: Path) -> None:
    facts, result = section(page, "How it was measured"), read(out / "result.json")
    digests = [
        result.subject["files"][0]["digest"], result.base["digest"], result.probes,
        *(judge["digest"] for judge in result.judges),
    ]  # fmt: skip
    for said in (*digests, "quick, seed 0", "steps 2 · guidance 4.0", "scheduler ddim", "torch "):
        assert said in facts, said
    assert len(digests) == 5 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_every_figure_is_in_it_with_what_it_is(page: str, out: Path) -> None:
    figures = section(page, "All figures")
    for score in read(out / "result.json").scores:
        if score.metric in HEADLINES and not score.slice:
            assert f"<td>{score.metric}</td>" in figures and about(score.metric), score.metric


def test_names_from_files_are_text_in_it() -> None:
    assert text("<script>&\"'") == "&lt;script&gt;&amp;&quot;&#x27;"


# -- in a browser ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a browser without a network made of a page; `codes` are its colours."""

    codes: np.ndarray
    console: list[str]
    requests: list[str]


def look(path: Path, folder: Path, *flags: str) -> Look:
    shot, log = folder / "shot.png", folder / "net.json"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}",
         f"--log-net-log={log}", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file(), done.stderr
    events = (event.get("params") or {} for event in json.loads(log.read_text())["events"])
    # the browser's own requests belong to no page, a page's are kept apart by its address
    of_page = [e["url"] for e in events if "file://" in str(e.get("network_isolation_key")) and "url" in e]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Look(codes(shot), console, of_page)


@needs_chromium
@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0",)], ids=["light", "dark"])
def test_a_browser_shows_the_grids_without_errors_or_network(
    flags: tuple[str, ...], out: Path, page: str, tmp_path: Path
) -> None:
    seen = look(out / "report.html", tmp_path, *flags)
    assert seen.console == [] and seen.requests == []
    assert (seen.codes[5, 5] > 0x800000) == (not flags), "paper is light or dark"
    for title, (before, after) in grids(page).items():
        for one, other in zip(before, after, strict=True):
            above, below = places(seen.codes, one, CELL), places(seen.codes, other, CELL)
            assert any(x == right and y < under for y, x in above for under, right in below), title


@needs_chromium
def test_a_browser_would_tell_of_errors_and_requests(tmp_path: Path) -> None:
    """The two silences above mean something."""
    bad = tmp_path / "bad.html"
    bad.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>undefined.x</script>')
    seen = look(bad, tmp_path)
    assert seen.requests and any("TypeError" in line for line in seen.console)
