"""The page itself: what stands where, and which button does what."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from conceptzap.errors import ConceptZapError, ResourceError, ran_out_of_memory
from conceptzap.playground import view, work
from conceptzap.registry import catalog
from conceptzap.terminal.speech import one_line

HEAD = """<h1>conceptzap</h1>
<p>A frozen checkpoint and one small file. Left of the handle the original, right of it erased.</p>"""
TOLD = """<p>The file goes into the folder of this page. Before it is done, pictures are drawn and judged;
what is still there is said. A minute or more on a CPU.</p>"""
ALONE = {"concurrency_limit": 1, "concurrency_id": "base"}
QUIET = {"show_progress": "hidden"}


@contextmanager
def refusing() -> Iterator[None]:
    """Whatever is refused inside is shown as one line on the page."""
    try:
        yield
    except ConceptZapError as error:
        raise _shown(error) from error
    except Exception as error:
        if ran_out_of_memory(error):
            raise _shown(ResourceError("out of memory", "use another base or smaller pictures")) from error
        raise


def _shown(error: ConceptZapError) -> gr.Error:
    return gr.Error(_plain(f"{error}; {error.hint}".removesuffix("; ")), print_exception=False, duration=None)


def _plain(text: str) -> str:
    """One line of text where the page takes HTML."""
    return html.escape(one_line(text))


def _report(progress: gr.Progress) -> work.Told:
    return work.Told(lambda part, text: progress(part, desc=text), lambda text: gr.Warning(_plain(text)))


def page(folder: Path, base: str) -> gr.Blocks:
    """The page over the erasures of a folder. One thing is done at a time: edits sit on the base."""
    with gr.Blocks(title="conceptzap", analytics_enabled=False, fill_width=True) as board:
        gr.HTML(HEAD, elem_id="head")
        with gr.Tab("Draw"):
            files, checkpoint = _draw_tab(folder, base)
        with gr.Tab("Erase"):
            _erase_tab(folder, checkpoint, files)
        board.load(lambda: gr.Dropdown(choices=work.erasures(folder)), None, files, **QUIET)
    return board


def _draw_tab(folder: Path, base: str) -> tuple[gr.Dropdown, gr.Textbox]:
    known = work.erasures(folder)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            checkpoint = gr.Textbox(base, label="Base", info="demo, a hub id[@revision], a folder or a file")
            files = gr.Dropdown(
                known, value=known[:1], multiselect=True, allow_custom_value=True, label="Erasures",
                info="files here, paths, or hf://user/repo/file",
            )  # fmt: skip
            strengths = gr.State({})
            _sliders(files, strengths)
            prompt = gr.Textbox(work.example(folder, known), label="Prompt", lines=2)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                steps = gr.Number(0, label="Steps (0: usual)", precision=0, minimum=0, min_width=90)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3, min_width=280):
            pictures = gr.ImageSlider(label="Before and after", elem_id="pictures", format="png")
            receipts = gr.HTML(label="Receipts", elem_id="receipts")
    given = [checkpoint, files, strengths, prompt, seed, steps]
    gr.on(
        [button.click, prompt.submit], partial(_draw, folder), given, [pictures, receipts],
        api_name="draw", show_progress_on=pictures, **ALONE,
    )  # fmt: skip
    return files, checkpoint


def _sliders(files: gr.Dropdown, strengths: gr.State) -> None:
    """A strength for every file that is chosen."""

    @gr.render(inputs=files)
    def sliders(chosen: list[str]) -> None:
        for name in chosen or ():
            slider = gr.Slider(0, 2, 1, step=0.05, label=f"Strength of {name}", key=f"strength of {name}")
            slider.change(partial(_set, name), [slider, strengths], strengths, **QUIET)


def _set(name: str, value: float, strengths: dict[str, float]) -> dict[str, float]:
    return {**strengths, name: value}


def _erase_tab(folder: Path, checkpoint: gr.Textbox, files: gr.Dropdown) -> None:
    methods = catalog.methods()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            concept = gr.Textbox(label="Concept", placeholder="Van Gogh")
            anchor = gr.Textbox(label="Becomes", placeholder="painting (empty: what is near)")
            method = gr.Dropdown(
                [one["name"] for one in methods], label="Method",
                value=next(one["name"] for one in methods if one["default"]),
            )  # fmt: skip
            with gr.Row():
                steps = gr.Number(0, label="Steps (0: usual)", precision=0, minimum=0, min_width=90)
                name = gr.Textbox(label="File", placeholder="named after the concept", min_width=90)
            button = gr.Button("Erase", variant="primary")
        with gr.Column(scale=3, min_width=280):
            said = gr.HTML(TOLD, elem_id="said")
    button.click(
        partial(_erase, folder), [checkpoint, concept, anchor, method, steps, name, files], [said, files],
        api_name="erase", show_progress_on=said, **ALONE,
    )  # fmt: skip


def _draw(
    folder: Path, base: str, files: list[str], strengths: dict[str, float], prompt: str, seed: float,
    steps: float, progress: gr.Progress = gr.Progress(),
) -> tuple[Any, ...]:  # fmt: skip
    with refusing():
        done = work.draw(folder, base, files or [], strengths, prompt, seed, steps, _report(progress))
    return (done.before, done.after), view.receipts(done)


def _erase(
    folder: Path, base: str, concept: str, anchor: str, method: str, steps: float, name: str,
    chosen: list[str], progress: gr.Progress = gr.Progress(),
) -> tuple[Any, ...]:  # fmt: skip
    with refusing():
        made = work.erase(folder, base, concept, anchor, method, steps, name, _report(progress))
    chosen = list(dict.fromkeys([*(chosen or ()), made.name]))
    return view.scores(made), gr.Dropdown(choices=work.erasures(folder), value=chosen)
