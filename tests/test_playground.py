"""The page to play with: what it draws and says, by the verbs; then the page itself in a browser."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from browser import AXE, SERIOUS, needs_axe, needs_chromium
from command import conceptzap, refused
from devtools import Tab, tab
from edits import ASKED, OTHER, gate
from erasures import nudge

import conceptzap as cz
from conceptzap import api, format
from conceptzap.base.bpe import spelled
from conceptzap.errors import FormatError, MismatchError, ThresholdError, UsageError
from conceptzap.playground import serving, view, work
from conceptzap.report import Report
from conceptzap.result import Score
from conceptzap.runtime.gates import Panel
from conceptzap.trust import canary
from conceptzap.verbs import reading

HOSTILE = "<img src=x onerror=alert(1)>"


def gated(base: cz.Base, asked: tuple[str, ...] = ASKED, other: tuple[str, ...] = OTHER) -> cz.Erasure:
    """An erasure that acts behind a gate that reads the text."""
    from conceptzap.training import detector
    from conceptzap.training.states import States

    one = nudge(base, asked[0], 0.2)
    found = gate(base) if asked is ASKED else detector.fit_gate(
        States.of(base, [*asked, *asked, *other, *other]), [*asked, *asked], [*other, *other], seed=0
    )  # fmt: skip
    edits = tuple(sorted((dataclasses.replace(e, gates=(found,)) for e in one.edits), key=lambda e: e.name))
    header = dataclasses.replace(one.header, canary=canary.make(base, edits, asked[0]))
    return format.seal(cz.Erasure(header, edits))


@pytest.fixture(scope="module")
def folder(sd1: cz.Base, church: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page")
    cz.save(gated(sd1), place / "van-gogh")
    (place / church.name).write_bytes(church.read_bytes())
    return place


def drawn(folder: Path, base: Path, files: list[str], prompt: str, **strengths: float) -> work.Shown:
    return work.draw(work.Desk(folder), str(base), files, strengths, prompt, 3, 1, Report())


# what the gates read


@pytest.mark.parametrize("prompt", [*ASKED, *OTHER])
def test_a_reading_is_above_0_where_the_gate_is_open(sd1: cz.Base, prompt: str) -> None:
    edits = gated(sd1).edits
    opens = bool(Panel(edits).text(sd1.encode([prompt]).states).match.any())
    found = reading.margins(sd1, edits, prompt)
    assert (max(value for _, value in found) > 0) == opens == (prompt in ASKED)
    assert [word for word, _ in found] == [*prompt.split(), reading.REST]
    assert all(-1 <= value <= 1 for _, value in found)


def test_without_a_gate_nothing_is_read(sd1: cz.Base) -> None:
    assert reading.margins(sd1, nudge(sd1, "church").edits, "a cat") == [("a", None), ("cat", None), ("(end)", None)]


def test_a_long_prompt_is_read_as_far_as_it_is_read(sd1: cz.Base) -> None:
    assert len(reading.margins(sd1, gated(sd1).edits, "cat " * 200)) == sd1.max_tokens + 1


@pytest.mark.parametrize("word", ["cat", "né", "猫"])
def test_words_are_spelled_as_they_were_written(word: str, sd1: cz.Base) -> None:
    tokenizer = sd1.tokenizers[0]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(word, add_special_tokens=False).input_ids)
    assert spelled(pieces) == word
    assert spelled(["Ā</w>"]) == "\0" and spelled(["猫</w>"]) == "?"


# drawing


def test_the_same_seed_before_and_after(folder: Path, tiny_folder: Path) -> None:
    done = drawn(folder, tiny_folder, ["van-gogh", "church"], ASKED[0], church=0.5)
    assert done.before.shape == done.after.shape and (done.before != done.after).any()
    by_name = {one.name: one for one in done.receipts}
    assert by_name["church"].strength == 0.5 and all(one.fired for one in done.receipts)
    assert max(value for _, value in by_name[ASKED[0]].words) > 0
    alone = drawn(folder, tiny_folder, [], ASKED[0])
    assert (alone.before == done.before).all() and (alone.after == done.before).all() and not alone.receipts


def test_a_shut_gate_changes_nothing_and_the_receipt_says_so(folder: Path, tiny_folder: Path) -> None:
    done = drawn(folder, tiny_folder, ["van-gogh"], OTHER[1])
    assert (done.before == done.after).all() and not done.receipts[0].fired
    assert "shut" in view.receipts(done)


def test_it_refuses_what_the_command_line_refuses(folder: Path, tiny_folder: Path, sdxl: cz.Base) -> None:
    cz.save(nudge(sdxl, "cat"), folder / "other", force=True)
    for error, files, prompt, strength in (
        (UsageError, ["church"], "  ", 1), (FormatError, ["none"], "a cat", 1),
        (MismatchError, ["other"], "a cat", 1), (UsageError, ["church"], "a cat", 3),
        (UsageError, ["church"], str(folder / "church.lprompt.safetensors"), 1),
        (UsageError, ["hf://x"], "a cat", 1),
    ):  # fmt: skip
        with pytest.raises(error):
            drawn(folder, tiny_folder, files, prompt, church=strength)
    (folder / "other.lprompt.safetensors").unlink()


def test_it_proposes_a_prompt_that_shows_the_point(folder: Path) -> None:
    assert work.Desk(folder).erasures() == ["church", "van-gogh"]
    assert work.Desk(folder).example() == "a church" and "Gogh" in work.Desk(folder.parent).example()


# erasing


def made(path: Path, **scores: Score) -> Any:
    return SimpleNamespace(path=path, bytes=12000, seconds=1.0, digest="0" * 64, method="uce", scores=scores,
                           verdict="gone")  # fmt: skip


def test_erasing_asks_the_verb_and_says_what_became_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def erase(concept: str, **given: Any) -> Any:
        asked.update(given, concept=concept)
        return made(folder / "a.lprompt.safetensors", leak=Score("leak", 0.25, 0.1, 0.5, 24))

    monkeypatch.setattr(api, "erase", erase)
    monkeypatch.setattr(work.Desk, "base", lambda self, name: name)
    done = work.erase(work.Desk(folder), "demo", " Van Gogh ", "", "", "fast", 0, "a", Report())
    assert (done.name, done.scores) == ("a", [("still shown (leak)", "25.0 %", "10.0 to 50.0 %", "24")])
    assert asked["concept"] == "Van Gogh" and asked["anchors"] == () and asked["steps"] is None
    assert asked["preset"] == "fast" and asked["method"] is None and asked["output"] == folder / "a"
    assert "gone" in view.scores(done) and "12 kB" in view.scores(done)
    with pytest.raises(UsageError, match="no concept"):
        work.erase(work.Desk(folder), "demo", " ", "", "", "", 0, "", Report())


def test_a_concept_that_is_still_drawn_is_said_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ThresholdError("not erased", "try more steps")
    error.made = made(folder / "a.lprompt.safetensors")

    def erase(concept: str, **given: Any) -> Any:
        raise error

    monkeypatch.setattr(api, "erase", erase)
    monkeypatch.setattr(work.Desk, "base", lambda self, name: name)
    done = work.erase(work.Desk(folder), "demo", "x", "", "uce", "", 0, "", Report())
    assert "not erased; try more steps" in done.said


def test_progress_is_handed_on() -> None:
    told: list[tuple[float, str]] = []
    report = work.Told(lambda part, text: told.append((part, text)), lambda text: told.append((-1, text)))
    report.phase("loading")
    report.warn("odd")
    event = SimpleNamespace(step=2, total=4, terms={"loss": 0.5})
    assert list(report.progress([event])) == [event] and list(report.count("ab", 2, "drawing")) == ["a", "b"]
    assert told == [(0, "loading"), (-1, "odd"), (0.5, "training, step 2 of 4: loss 0.5"),
                    (0.5, "drawing, 1 of 2"), (1, "drawing, 2 of 2")]  # fmt: skip


def test_no_text_is_taken_for_html() -> None:
    receipt = work.Receipt(HOSTILE, "0" * 64, 1.0, True, [(HOSTILE, 0.5), ("x", None)])
    dot = torch.zeros(1, 1, 3).numpy()
    shown = view.receipts(work.Shown(dot, dot, [receipt])) + view.scores(work.Made("a", HOSTILE, []))
    assert "<img" not in shown and shown.count("&lt;img") == 3


# the command


def test_without_gradio_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(tmp_path, 5, "gradio", "ui", tmp_path)
    assert "conceptzap[ui]" in conceptzap("ui", tmp_path).error
    refused(tmp_path, 2, "is no folder", "ui", tmp_path / "none")


# the page


@pytest.fixture(scope="module")
def page(demo_base: cz.Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page over the built-in checkpoint and one erasure, served on a free port."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'conceptzap[ui]'")
    place = tmp_path_factory.mktemp("served")
    cz.save(gated(demo_base, ("church", "a church"), ("a cat", "a house", "")), place / "church")
    served = serving.ui(place, block=False, told=lambda url: None)
    yield served
    served.close()


@pytest.fixture(scope="module")
def shown(page: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(page.local_url, tmp_path_factory.mktemp("profile") / "chromium") as opened:
        opened.size(1280, 900)
        opened.wait("document.body.innerText.includes('Strength of church')")
        yield opened


STILL = """document.head.insertAdjacentHTML('beforeend',
  '<style>* { transition: none !important; animation: none !important; }</style>')"""
PRESS = "[...document.querySelectorAll('button%s')].find(one => one.innerText == '%s' && one.offsetParent).click()"
TOLD = "[...document.querySelectorAll('.toast-body')].map(one => one.innerText).join().match(/.*%s.*/)?.[0]"
BOX = """(() => {
  const [name, value] = ['%s', '%s'];
  const label = [...document.querySelectorAll('label')].find(one => one.innerText.trim().startsWith(name));
  const box = label.querySelector('input, textarea') ?? document.querySelector(`input[aria-label*="${name}"]`);
  Object.getOwnPropertyDescriptor(Object.getPrototypeOf(box), 'value').set.call(box, value);
  for (const kind of ['input', 'change']) box.dispatchEvent(new Event(kind, { bubbles: true }));
})()"""


@needs_chromium
def test_it_draws_before_and_after_and_shows_the_gates(shown: Tab, tmp_path: Path) -> None:
    shown.ask(BOX % ("Steps", "2"))
    shown.ask(PRESS % (".primary", "Draw"))
    shown.wait("document.querySelectorAll('#pictures img').length == 2")
    shown.wait("document.querySelector('#receipts .open')?.innerText == 'open'")
    words = shown.ask("[...document.querySelectorAll('#receipts .word.opens')].map(one => one.innerText)")
    assert "church" in words
    shown.wait("[...document.querySelectorAll('#pictures img')].every(one => one.naturalWidth == 512)")
    for width in (1280, 390):
        shown.size(width, 844)
        assert shown.ask("document.documentElement.scrollWidth") <= width
        shown.photograph(tmp_path / f"{width}.png")
        assert (tmp_path / f"{width}.png").stat().st_size > 20_000
    shown.size(1280, 900)


@needs_axe
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_everybody_can_read_it(shown: Tab, scheme: str) -> None:
    shown.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    shown.ask(STILL)
    shown.ask(f"{AXE.read_text(encoding='utf-8')}; 1")
    found = shown.ask(
        "axe.run(document, { resultTypes: ['violations'] }).then((done) => done.violations.map("
        "(one) => [one.impact, one.id, ...one.nodes.map((node) => node.html.slice(0, 200))]))"
    )
    assert not [fault for fault in found if fault[0] in SERIOUS]


@needs_chromium
def test_what_is_refused_is_one_line(shown: Tab) -> None:
    shown.ask(BOX % ("Prompt", " "))
    shown.ask(PRESS % (".primary", "Draw"))
    text = shown.wait("document.querySelector('.toast-body')?.innerText")
    assert text.split("\n")[-1] == "no picture was asked for; write a prompt, for example: a cat"
    shown.ask(BOX % ("Prompt", "a cat"))
    shown.ask(BOX % ("Base", HOSTILE))
    shown.ask(PRESS % (".primary", "Draw"))
    assert HOSTILE in shown.wait(TOLD % "<")
    assert shown.ask("document.querySelectorAll('.toast-body img').length") == 0
    shown.ask(BOX % ("Base", "demo"))


@needs_chromium
def test_erasing_shows_its_progress(shown: Tab, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def erase(concept: str, report: Report, output: str, **_: Any) -> Any:
        for _ in report.count(range(40), 40, "drawing with the base"):
            time.sleep(0.05)
        path = Path(output) / "cat.lprompt.safetensors"
        path.write_bytes((Path(output) / "church.lprompt.safetensors").read_bytes())
        return made(path, leak=Score("leak", 0.0, 0.0, 0.1, 24))

    monkeypatch.setattr(api, "erase", erase)
    shown.ask(BOX % ("Strength of church", "0.5"))
    shown.ask(PRESS % ("[role=tab]", "Erase"))
    shown.wait("!!document.querySelector('#said')?.offsetParent")
    shown.ask(BOX % ("Concept", "cat"))
    shown.ask(PRESS % (".primary", "Erase"))
    shown.wait("document.body.innerText.includes('drawing with the base')")
    shown.wait("document.querySelector('#said .scores')?.innerText.includes('0.0 to 10.0 %')")
    shown.ask(PRESS % ("[role=tab]", "Draw"))
    shown.wait("document.body.innerText.includes('Strength of cat')")
    shown.ask(PRESS % (".primary", "Draw"))  # cat is the same file once more, at another strength
    assert "strengths 0.5 and 1" in shown.wait(TOLD % "strengths")


@needs_chromium
def test_nothing_is_asked_of_anybody_else(shown: Tab, page: Any) -> None:
    """Last of those that use the page: all that it asked for came from its own server."""
    own = (page.local_url, "data:", "blob:", "about:")
    assert not [url for url in shown.requests if not url.startswith(own)] and not shown.complaints


def test_only_this_machine_is_served(page: Any) -> None:
    import urllib.error
    import urllib.request

    with urllib.request.urlopen(page.local_url) as answer:
        assert answer.headers["Content-Security-Policy"] == serving.POLICY
    strange = urllib.request.Request(page.local_url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(strange)
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
    assert not page.analytics_enabled
    port = page.local_url.rstrip("/").rpartition(":")[2]
    answer = conceptzap("ui", ".", "--port", port)
    assert answer.code == 5 and "cannot be served" in answer.error
