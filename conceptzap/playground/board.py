"""The page itself: what stands where, and which button does what."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gradio as gr

from conceptzap.errors import ConceptZapError, ResourceError, ran_out_of_memory
from conceptzap.playground import view, work
from conceptzap.registry import catalog, config
from conceptzap.terminal.speech import one_line

HEAD = """<h1>conceptzap</h1>
<p>A frozen checkpoint and one small file. Left of the handle the original, right of it erased.</p>"""
TOLD = """<p>The file goes into the folder of this page. Before it is done, pictures are drawn and judged;
what is still there is said. That takes a minute or more on a CPU; with the preset fast, least.</p>"""
USUAL = ("usual", "")  # a choice that is not made
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


def page(desk: work.Desk, base: str) -> gr.Blocks:
    """The page over a desk. One thing is done at a time: edits sit on the base."""
    with gr.Blocks(title="conceptzap", analytics_enabled=False, fill_width=True) as board:
        gr.HTML(HEAD, elem_id="head")
        with gr.Tab("Draw"):
            files, checkpoint = _draw_tab(board, desk, base)
        with gr.Tab("Erase"):
            _erase_tab(desk, checkpoint, files)
        board.load(lambda: gr.Dropdown(choices=desk.erasures()), None, files, **QUIET)
    return board


def _draw_tab(board: gr.Blocks, desk: work.Desk, base: str) -> tuple[gr.Dropdown, gr.Textbox]:
    known = desk.erasures()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            checkpoint = gr.Textbox(base, label="Base", info="demo, a hub id[@revision], a folder or a file")
            files = gr.Dropdown(
                known, value=known[:1], multiselect=True, allow_custom_value=True, label="Erasures",
                info="files here, paths, or hf://user/repo/file",
            )  # fmt: skip
            strengths = gr.State({})
            _sliders(board, files, strengths)
            prompt = gr.Textbox(desk.example(), label="Prompt", lines=2)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                steps = gr.Number(0, label="Steps (0: usual)", precision=0, minimum=0, min_width=90)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3, min_width=280):
            pictures = gr.ImageSlider(label="Before and after", elem_id="pictures", format="png")
            receipts = gr.HTML(label="Receipts", elem_id="receipts")
    given = [checkpoint, files, strengths, prompt, seed, steps]
    gr.on(
        [button.click, prompt.submit], partial(_draw, desk), given, [pictures, receipts],
        api_name="draw", show_progress_on=pictures, **ALONE,
    )  # fmt: skip
    return files, checkpoint


def _sliders(board: gr.Blocks, files: gr.Dropdown, strengths: gr.State) -> None:
    """A strength for every file that is chosen, as it was where it was set before."""

    @gr.render(inputs=[files, strengths], triggers=[board.load, files.change])
    def sliders(chosen: list[str], known: dict[str, float]) -> None:
        for name in chosen or ():
            slider = gr.Slider(0, 2, known.get(name, 1), step=0.05, label=f"Strength of {name}")
            slider.change(partial(_set, name), [slider, strengths], strengths, **QUIET)


def _set(name: str, value: float, strengths: dict[str, float]) -> dict[str, float]:
    return {**strengths, name: value}


def _erase_tab(desk: work.Desk, checkpoint: gr.Textbox, files: gr.Dropdown) -> None:
    methods = [one["name"] for one in catalog.methods()]
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            concept = gr.Textbox(label="Concept", placeholder="Van Gogh")
            anchor = gr.Textbox(label="Becomes", placeholder="painting (empty: what is near)")
            with gr.Row():
                preset = gr.Dropdown([USUAL, *config.preset_names()], value="", label="Preset", min_width=90)
                method = gr.Dropdown([USUAL, *methods], value="", label="Method", min_width=90)
            with gr.Row():
                steps = gr.Number(0, label="Steps (0: usual)", precision=0, minimum=0, min_width=90)
                name = gr.Textbox(label="File", placeholder="the concept's name", min_width=90)
            button = gr.Button("Erase", variant="primary")
        with gr.Column(scale=3, min_width=280):
            said = gr.HTML(TOLD, elem_id="said")
    given = [checkpoint, concept, anchor, method, preset, steps, name, files]
    button.click(
        partial(_erase, desk), given, [said, files],
        api_name="erase", show_progress_on=said, **ALONE,
    )  # fmt: skip


def _draw(
    desk: work.Desk, base: str, files: list[str], strengths: dict[str, float], prompt: str, seed: float,
    steps: float, progress: gr.Progress = gr.Progress(),
) -> tuple[Any, ...]:  # fmt: skip
    with refusing():
        done = work.draw(desk, base, files or [], strengths, prompt, seed, steps, _report(progress))
    return (done.before, done.after), view.receipts(done)


def _erase(
    desk: work.Desk, base: str, concept: str, anchor: str, method: str, preset: str, steps: float,
    name: str, chosen: list[str], progress: gr.Progress = gr.Progress(),
) -> tuple[Any, ...]:  # fmt: skip
    with refusing():
        given = (base, concept, anchor, method, preset, steps, name)
        made = work.erase(desk, *given, _report(progress))
    chosen = list(dict.fromkeys([*(chosen or ()), made.name]))
    return view.scores(made), gr.Dropdown(choices=desk.erasures(), value=chosen)
