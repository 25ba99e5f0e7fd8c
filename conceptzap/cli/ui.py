"""A page to play with, in a browser on this machine.

    conceptzap ui
    conceptzap ui ~/erasures --base stable-diffusion-v1-5/stable-diffusion-v1-5 --port 7870

Pictures of one seed before and after with a slider, strengths, what the gates read in a prompt, receipts;
and erasing, with its progress. It shows the erasures of a folder, and writes new ones there. Nobody else
can reach it, and it reaches nobody. Needs the extra `ui`: pip install "conceptzap[ui]". Ctrl-C ends it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", parser=options.path, help="Of the erasures.", show_default="here"),
    ] = Path(),
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", help="[default: the first free one from 7860]")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in a browser.")] = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap.playground.serving import ui
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    def told(url: str) -> None:
        show.emit("ui", {"url": url}) if as_json else show.lines([url])
        show.note("Ctrl-C ends it")

    Progress().phase("starting the page")
    ui(
        folder, base=base, prediction=prediction, device=device, dtype=dtype, port=port, browser=browser,
        told=told,
    )  # fmt: skip
