"""Chromium without a network or a window: what it makes of a page, and what a script finds in it.

axe-core, if npm has put it where `.ci/run` does, says what on a page keeps people from reading it.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--force-color-profile=srgb", "--enable-logging=stderr", "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1300,6000",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
WIDTHS, SCREEN = (390, 768, 1280), 844  # pixels of a telephone, a tablet, a laptop; of a telephone's height
AXE = Path(__file__).parents[1] / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
SERIOUS = ("serious", "critical")
FOUND = "what the script found: "
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="NO CHROMIUM IS INSTALLED: the report is not looked at in a browser"
)
needs_axe = pytest.mark.skipif(
    CHROMIUM is None or not AXE.is_file(),
    reason="chromium or axe-core is missing: npm install --prefix build/axe axe-core",
)
WRAPPER = f"""<!doctype html><title>0</title><script>
addEventListener("message", (event) => {{
  document.body.append("{FOUND}" + JSON.stringify(event.data), "\\n");
}});
</script>"""
FAULTS = """addEventListener("load", () => axe.run(document, { resultTypes: ["violations"] }).then((done) => {
  const shown = (one) => one.nodes.map((node) => node.html.slice(0, 200) + " " + node.failureSummary);
  const faults = done.violations.map((one) => [one.impact, one.id, ...shown(one).slice(0, 3)]);
  parent.postMessage({ width: innerWidth, rules: done.passes.length, faults }, "*");
}));"""


def framed(
    page: str, scripts: Sequence[str], folder: Path, *flags: str, widths: Sequence[int] = WIDTHS
) -> dict[int, dict[str, Any]]:
    """Width -> what the scripts, put at the end of a page, posted to their parent there."""
    ending = "".join(f"<script>{script}</script>" for script in scripts)
    free = re.sub(r"<meta http-equiv=[^>]*>", "", page)
    body, _, rest = free.rpartition("</body>")
    (folder / "page.html").write_text(f"{body}{ending}</body>{rest}", encoding="utf-8")
    frames = (f'<iframe src="page.html" width="{width}" height="{SCREEN}"></iframe>' for width in widths)
    (folder / "all.html").write_text(f"{WRAPPER}<body>{''.join(frames)}</body>")
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=20000", "--dump-dom", (folder / "all.html").as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    found = [json.loads(html.unescape(line)) for line in re.findall(f"{FOUND}(\\{{.*\\}})", done.stdout)]
    assert len(found) == len(widths), done.stderr
    return {one["width"]: one for one in found}


def faults(page: str, folder: Path, *flags: str, widths: Sequence[int] = WIDTHS) -> list[str]:
    """What axe-core calls serious in a page at these widths, and what it says of it."""
    found = framed(page, [AXE.read_text(encoding="utf-8"), FAULTS], folder, *flags, widths=widths)
    assert all(one["rules"] > 3 for one in found.values()), "it has looked"
    return [
        f"{width} px: {' '.join(fault)}"
        for width, one in found.items()
        for fault in one["faults"]
        if fault[0] in SERIOUS
    ]
