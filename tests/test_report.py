"""The report: one file that fetches nothing, with everything in it, seen in a browser at three widths."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import re
import shlex
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import (
    CHROMIUM,
    DARK,
    FLAGS,
    SCREEN,
    WIDTHS,
    faults,
    framed,
    needs_axe,
    needs_chromium,
)
from erasures import nudge
from PIL import Image
from test_attention import learned

from conceptzap import api, format
from conceptzap.base import Base
from conceptzap.edit import Edit, Erasure
from conceptzap.evaluation import verdict
from conceptzap.evaluation.phrases import HEADLINES, NAMES, SLICES, about, interval
from conceptzap.evaluation.run import Evaluation
from conceptzap.page import figures, report, samples, strength
from conceptzap.page.samples import SHOWN
from conceptzap.report import Report
from conceptzap.trust import canary
from conceptzap.verbs.evaluating import read

SIDE, CELL = 16, 8  # pixels of a picture of the tiny base, and of each of them on the page


def with_tokens(base: Base) -> Erasure:
    """An erasure of `church` with learned tokens."""
    made = nudge(base, "church")
    edits: tuple[Edit, ...] = tuple(sorted((*made.edits, learned(base)), key=lambda edit: edit.name))
    sites = [site for edit in edits for site in edit.sites]
    tested = canary.make(base, edits, "a photo of a church")
    header = {**vars(made.header), "base": base.reference(sites), "canary": tested}
    return format.seal(Erasure(type(made.header)(**header), edits))


@pytest.fixture(scope="module")
def done(sd1: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The quick suite, every slice of it, with the built-in judges on the tiny base's pictures."""
    folder = tmp_path_factory.mktemp("report")
    format.save(with_tokens(sd1), folder / "church.lprompt.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCEPTZAP_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        return api.evaluate(
            "church.lprompt.safetensors", str(tiny_folder), suite="quick", limit=9, steps=1,
            output=folder / "out",
        )  # fmt: skip


@pytest.fixture(scope="module")
def out(done: Evaluation) -> Path:
    return done.written["folder"]


@pytest.fixture(scope="module")
def page(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading."""
    return page.partition(f">{heading}</h2>")[2].partition("<h2")[0]


def grids(page: str) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Title -> the pictures of its base row and of its erased row."""
    found = {}
    for part in section(page, "Same seed, before and after").split("<h3>")[1:]:
        title = html.unescape(part.partition("<span")[0])
        pairs = [one for one in part.split("<figure")[1:] if " extra" not in one.partition(">")[0]]
        rows = zip(*(re.findall(r"base64,([^\"]+)", one) for one in pairs), strict=True)
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


def places(shot: np.ndarray, pictures: list[np.ndarray], cell: int) -> list[set[tuple[int, int]]]:
    """Where (y, x) each picture stands in a screenshot, each of its pixels `cell` wide; corners are round."""
    inside = [(y, x) for y in range(2, SIDE - 2) for x in range(2, SIDE - 2)]
    wanted = [_codes(picture) for picture in pictures]
    y, x = first = inside[0]
    # one look through all of the screenshot, for the first of these pixels of any picture
    hits = np.argwhere(np.isin(shot, [codes[first] for codes in wanted], kind="table"))  # [hits, 2]
    seen, found = shot[tuple(hits.T)], []
    hits -= cell * y + cell // 2, cell * x + cell // 2
    fits = (hits >= 0).all(1) & (hits <= np.array(shot.shape) - cell * SIDE).all(1)
    for codes in wanted:
        here = hits[fits & (seen == codes[first])]
        for y, x in inside:
            rows, columns = here.T
            here = here[shot[rows + cell * y + cell // 2, columns + cell * x + cell // 2] == codes[y, x]]
        found.append({(int(row), int(column)) for row, column in here})
    return found


# -- what is in it --------------------------------------------------------------------------------


def test_it_fetches_nothing_and_runs_one_script_alone(page: str, out: Path) -> None:
    assert not re.findall(r"src=[\"'](?!data:image/(?:png|jpeg);base64,)", page)
    plain = re.sub(r"base64,[^\"]*", "", page)
    assert "://" not in plain and "url(" not in plain and "@import" not in plain and "<link" not in plain
    for target in re.findall(r"href=\"([^\"]*)\"", page):
        inside = target.startswith("#") and f'id="{target[1:]}"' in page
        assert inside or (out / target).is_file(), target
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r"Content-Security-Policy\" content=\"([^\"]*)\"", page)
    policy = html.unescape(policy)
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert not re.findall(r"\son[a-z]+=", plain), "no handler in an attribute"


def test_every_pair_has_its_seed_a_command_and_what_the_judges_see(page: str, done: Evaluation) -> None:
    pairs = section(page, "Same seed, before and after").split("<figure")[1:]
    probes = {str(probe.seed): probe for probe in done.probes}
    for one in pairs:
        (command,) = re.findall(r'data-copy="([^"]*)"', one)
        words = shlex.split(html.unescape(command))
        probe = probes[words[words.index("--seed") + 1]]
        assert words[:2] == ["conceptzap", "generate"] and words[-1] == probe.prompt
        assert words[words.index("--with") + 1] == "church.lprompt.safetensors"
        assert words[words.index("--steps") + 1] == "1" and f">seed {probe.seed}<" in one
        assert len(re.findall(r'title="(?:original|erased): [^"]*object: ', one)) == 2
    assert shlex.split(done.command)[:5] == [
        "conceptzap", "evaluate", "church.lprompt.safetensors", "--suite", "quick"
    ]  # fmt: skip
    assert html.escape(done.command) in page.replace("&#39;", "&#x27;")


def test_its_title_is_what_the_figures_say(page: str, done: Evaluation) -> None:
    """The tiny base draws no church that the classifiers would know."""
    said = verdict.title(done.result)
    assert said == "Church: nothing to tell by" and f"<title>{said}</title>" in page
    assert f"<h1>{said}</h1>" in page and verdict.sentence(done.result) in page


def test_it_shows_how_it_fades_in(page: str, done: Evaluation) -> None:
    rows = section(page, "How strong").split("<tr>")[2:]
    assert len(rows) == strength.PROMPTS
    for row in rows:
        pictures = [_decoded(data) for data in re.findall(r"base64,([^\"]+)", row)]
        assert len(pictures) == len(strength.STRENGTHS)
        assert not np.array_equal(pictures[0], pictures[-1]), "nothing and all of it"


def test_what_went_wrong_is_marked_and_there_is_more_of_it(page: str, done: Evaluation) -> None:
    strips = samples.strips(done)
    assert any(strip.faults for strip in strips)
    for strip in strips:
        assert len(strip.pairs) == min(SHOWN, strip.total)
        assert all(pair.fault for pair in strip.faults) and len(strip.faults) <= SHOWN
        assert f"{strip.wrong} of {strip.total} pictures went wrong" in page
    marked = sum(bool(pair.fault) for strip in strips for pair in (*strip.pairs, *strip.faults))
    assert page.count('class="pair fault ') == marked


def test_its_summary_has_figures_with_intervals(page: str, out: Path) -> None:
    result = read(out / "result.json")
    for metric in ("E", "P", "H", "Leak@1", "Leak@20", "validity", "drift", "identical"):
        score = result.score(metric)
        name = NAMES.get(metric, metric)
        card = page.partition(f'<div class="card"><div>{name} · ')[2].partition('<div class="card">')[0]
        assert f"95 %: {interval(score)} · n = {score.n}" in card, metric
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
    assert all(places(sheet, [before[0], after[0]], CELL)), "the sheet has them too"


def test_its_bars_are_of_every_concept_and_slice(page: str, out: Path) -> None:
    bars, result = section(page, "Concept by concept"), read(out / "result.json")
    labels = [score.slice.partition("/")[2] for score in result.scores if score.metric == "right after"]
    for name in ("church", *filter(None, labels)):
        assert f'<div class="row"><span>{name}</span><div class="bar">' in bars, name
    assert bars.count('<div class="bar">') == len([*filter(None, labels)]) + sum(
        score.metric == "E" and bool(score.slice) for score in result.scores
    )


def test_it_says_what_the_judges_confuse(page: str, out: Path) -> None:
    seen = section(page, "What the classifiers see")
    assert "church is seen as" in seen and "Kept, but now mistaken" in seen
    shares = [int(share) for share in re.findall(r'<td class="n">(\d+) %</td>', seen)]
    asked = [row for row in csv.DictReader((out / "cells.csv").open()) if row["concept"] == "church"]
    tops = Counter(  # both judges' first labels: "object=house|fox; style=photo|photo"
        top for row in asked for top in row["before"].partition(";")[0].removeprefix("object=").split("|")
    )
    found = dict(zip(re.findall(r"<tr><td>([^<]*)</td><td><div", seen), shares[::2], strict=True))
    assert 0 < len(found) <= figures.FREQUENT
    for label, share in found.items():
        assert share == round(100 * tops[label] / tops.total()), label


def test_it_shows_attention_of_words_and_of_learned_tokens(page: str) -> None:
    shown = section(page, "Where it attends")
    assert shown.count('alt="attention of the concept&#39;s words"') == 2 * 4
    assert shown.count('alt="attention of learned tokens"') == 4
    shares = [float(share) for share in re.findall(r"([\d.]+) %</td>", shown)]
    assert len(shares) == 12 and all(0 < share < 100 for share in shares)


def test_it_says_how_it_was_measured(page: str, out: Path) -> None:
    facts, result = section(page, "How it was measured"), read(out / "result.json")
    digests = [
        result.subject["files"][0]["digest"], result.base["digest"], result.probes,
        *(judge["digest"] for judge in result.judges),
    ]  # fmt: skip
    for said in (*digests, "quick, seed 0", "steps 1 · guidance 4.0", "scheduler ddim", "torch "):
        assert said in facts, said
    assert len(digests) == 5 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_every_figure_is_in_it_with_what_it_is(page: str, out: Path) -> None:
    figures = section(page, "All figures")
    for score in read(out / "result.json").scores:
        if score.metric in HEADLINES and not score.slice:
            assert f"<td>{NAMES.get(score.metric, score.metric)}</td>" in figures, score.metric
            assert about(score.metric), score.metric


def test_names_from_files_are_text_in_it(done: Evaluation) -> None:
    bad = "<script>&\"'"
    result = replace(
        done.result, subject={"files": [{**done.result.subject["files"][0], "name": bad}], "concepts": {bad: bad}},
        base={**done.result.base, "id": bad}, judges=[{"name": bad, "digest": bad}], suite=bad,
        failed=({"leg": bad, "why": bad},),
    )  # fmt: skip
    found = report.html(replace(done, result=result, command=bad), [], Report())
    assert found.count("<script>") == 1 and bad not in found
    assert found.count("&lt;script&gt;&amp;&#34;&#39;") >= 8


def test_pictures_of_any_size_keep_their_shape() -> None:
    wide = figures.picture(np.zeros((256, 512, 3), np.uint8))
    assert (wide.width, wide.height, wide.sharp) == (128, 64, False)
    tall = figures.heat(np.eye(4), np.zeros((64, 32, 3), np.uint8))
    assert (tall.width, tall.height) == (64, 128)


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
@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
def test_a_browser_shows_the_grids_without_errors_or_network(
    flags: tuple[str, ...], out: Path, page: str, tmp_path: Path
) -> None:
    seen = look(out / "report.html", tmp_path, *flags)
    assert seen.console == [] and seen.requests == []
    assert (seen.codes[5, 5] > 0x800000) == (not flags), "paper is light or dark"
    pairs = [(title, *pair) for title, rows in grids(page).items() for pair in zip(*rows, strict=True)]
    titles, before, after = zip(*pairs, strict=True)
    found = places(seen.codes, [*before, *after], CELL)
    for title, above, below in zip(titles, found[: len(titles)], found[len(titles) :], strict=True):
        assert any(x == right and y < under for y, x in above for under, right in below), title


TRIED = """addEventListener("load", () => {
  const tall = [...document.querySelectorAll(".slice, table, .many, .wide, .cards, .verdict")];
  const found = { width: innerWidth, wide: document.documentElement.scrollWidth,
    tall: Math.max(...tall.map((one) => one.getBoundingClientRect().height)) };
  const shown = (which) => [...document.querySelectorAll(which)].filter((one) => one.offsetParent).length;
  found.pairs = shown(".pair");
  document.getElementById("only").click();
  found.right = shown(".pair:not(.fault)");
  found.faults = shown(".pair.fault");
  document.getElementById("only").click();
  document.querySelector(".pair .zoom").click();
  const large = document.getElementById("large");
  const slider = large.querySelector("input");
  slider.value = 30;
  slider.dispatchEvent(new Event("input"));
  found.large = [large.open, large.querySelector(".over").style.clipPath,
    large.querySelector("img").naturalWidth, large.querySelector("code").textContent];
  parent.postMessage(found, "*");
});"""


@pytest.fixture(scope="module")
def tried(page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Width -> what a script found that measured the page there, and clicked at it."""
    return framed(page, [TRIED], tmp_path_factory.mktemp("tried"))


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_read_at_any_width(width: int, tried: dict[int, dict[str, Any]]) -> None:
    assert tried[width]["wide"] <= width, "it scrolls sideways"
    assert tried[width]["tall"] <= 4 * SCREEN, "a block without a way round it"


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
def test_it_answers_clicks(width: int, tried: dict[int, dict[str, Any]], done: Evaluation) -> None:
    found, strips = tried[width], samples.strips(done)
    assert found["pairs"] == sum(len(strip.pairs) for strip in strips), "what is extra waits"
    everything = [pair for strip in strips for pair in (*strip.pairs, *strip.faults)]
    assert (found["right"], found["faults"]) == (0, sum(bool(pair.fault) for pair in everything))
    is_open, clip, pixels, command = found["large"]
    assert is_open and clip == "inset(0px 0px 0px 70%)" and pixels == SIDE
    assert command.startswith("conceptzap generate --with church.lprompt.safetensors")


@needs_axe
@pytest.mark.parametrize(("flags", "widths"), [((), WIDTHS), ((DARK,), WIDTHS[-1:])], ids=["light", "dark"])
def test_nothing_keeps_anybody_from_reading_it(
    flags: tuple[str, ...], widths: tuple[int, ...], page: str, tmp_path: Path
) -> None:
    assert faults(page, tmp_path, *flags, widths=widths) == []


@needs_axe
def test_what_keeps_people_from_reading_would_be_told(tmp_path: Path) -> None:
    bad = "<!doctype html><html><body><img src=x><p style='color:#ccc;background:#fff'>grey</p></body></html>"
    told = faults(bad, tmp_path, widths=WIDTHS[:1])
    assert any("image-alt" in one for one in told) and any("color-contrast" in one for one in told)


@needs_chromium
def test_a_browser_would_tell_of_errors_and_requests(tmp_path: Path) -> None:
    """The two silences above mean something."""
    bad = tmp_path / "bad.html"
    bad.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>undefined.x</script>')
    seen = look(bad, tmp_path)
    assert seen.requests and any("TypeError" in line for line in seen.console)
