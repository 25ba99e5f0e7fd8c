"""The report: one file that needs nothing, with its grids really there in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import stub_judges  # noqa: F401  (named on the command line)
import torch
from command import conceptzap
from erasures import nudge, write
from PIL import Image

from conceptzap import attention
from conceptzap.base import CROSS, Base
from conceptzap.edit import Edit
from conceptzap.result import Settings
from conceptzap.testing import save_tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--force-color-profile=srgb", "--window-size=1200,2400",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(sd1: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCEPTZAP_CACHE", str(folder / "cache"))
        answer = conceptzap(
            "evaluate", write(sd1, "church", folder), "--base", save_tiny(folder / "base"), "--suite",
            "imagenette", "--judge", "stub_judges:by_brightness", "--limit", 4, "--steps", 2, "-o",
            folder / "out",
        )  # fmt: skip
    assert answer.code == 0, answer.err
    return folder / "out" / "report.html"


def test_it_fetches_nothing_and_runs_nothing(report: Path) -> None:
    page = report.read_text()
    # nothing but inline pictures is a source, and a title is the only address-like thing
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image/png;base64,)", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_it_says_everything_that_was_measured(report: Path) -> None:
    page = report.read_text()
    for word in ("Same seed, before and after", "Concept by concept", "is seen as", "Where it attends",
                 "How it was measured", "prompts and seeds", "prefers-color-scheme: dark"):  # fmt: skip
        assert word in page, word
    for slice in ("erase/seen", "erase/held-out", "erase/synonym", "keep/unrelated"):
        assert slice in page
    # four cells of each of four slices, base and erased, and attention maps on top
    assert page.count("<img") >= 2 * 4 * 4
    assert len(re.findall(r"[0-9a-f]{64}", page)) >= 4


def test_names_from_files_are_text_in_it(sd1: Base, tmp_path: Path) -> None:
    from conceptzap.page.figures import text

    assert text("<script>&\"'") == "&lt;script&gt;&amp;&quot;&#x27;"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_grids_without_errors(report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={shot}", report.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # pictures of the tiny base are colourful noise; text, bars and paper are not
    colourful = (pixels.max(2) - pixels.min(2)) > 60
    rows, columns = colourful.any(1).sum(), colourful.any(0).sum()
    assert rows > 8 * 90 and columns > 4 * 90, f"{rows} rows and {columns} columns of pictures"


def test_attention_of_words_and_learned_tokens_adds_up(sd1: Base) -> None:
    width = sd1.module(sd1.sites(CROSS)[0]).to_k.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(3, width, generator=generator) for name in ("prompt_k", "prompt_v")}
    edit = Edit("tokens", sd1.sites(CROSS), rows)
    settings = Settings(steps=3)
    bare = attention.look(sd1, "a photo of a cat", ["cat"], 0, settings, ())
    erased = attention.look(sd1, "a photo of a cat", ["cat"], 0, settings, [edit])
    assert set(bare.maps) == {"concept"} and set(erased.maps) == {"concept", "learned"}
    assert bare.maps["concept"].shape == (attention.SIDE, attention.SIDE)
    assert 0 < erased.shares["learned"] < 1
    everything = attention.look(sd1, "cat", ["cat"], 0, settings, ())
    assert everything.shares["concept"] < 1


def test_attention_without_learned_tokens_is_of_words_alone(sd1: Base) -> None:
    seen = attention.look(sd1, "a dog", ["church"], 0, Settings(steps=2), nudge(sd1, "cat").edits)
    assert seen.maps == {} and seen.shares == {}


def test_attention_is_the_modules_own(sd1: Base) -> None:
    """All positions together get all attention, so queries, keys, heads and scale are the right ones."""
    tokenizer = sd1.tokenizers[0]
    prompt = "a photo of a cat"
    ids = tokenizer(prompt).input_ids
    assert attention.positions(sd1, prompt, ["cat"]) == [len(ids) - 2]
    assert attention.positions(sd1, "a cat and a cat", ["cat"])[0] == 2
