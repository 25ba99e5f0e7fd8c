"""The script that webui and Forge find in the extension: its controls, and when erasures go on and off."""

from __future__ import annotations

from typing import Any

import gradio as gr
from modules import paths, script_callbacks, scripts, shared

from conceptzap.integrations.webui import Session, files

ALWAYS = "conceptzap_always"


class EraseScript(scripts.Script):
    """Always there, below the prompt; does nothing while no erasure is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.session = Session()

    def title(self) -> str:
        return "Conceptzap"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion("Conceptzap", open=False):
            found = files(paths.models_path)
            chosen = gr.Dropdown(found, label="Erasures", multiselect=True, value=[])
            strength = gr.Slider(0.0, 2.0, value=1.0, step=0.05, label="Strength")
        return [chosen, strength]

    def process(self, p: Any, *args: Any) -> None:
        self.session.drop()

    def process_before_every_sampling(self, p: Any, chosen: Any, strength: float, **more: Any) -> None:
        always = shared.opts.data.get(ALWAYS) or []
        self.session.on(p, paths.models_path, [*always, *(chosen or [])], 1.0 if always else strength)

    def postprocess_batch(self, p: Any, *args: Any, **more: Any) -> None:
        for line in self.session.off():
            p.comment(line) if hasattr(p, "comment") else print(line)


def _settings() -> None:
    choices = {"choices": files(paths.models_path), "multiselect": True}
    label, section = "Erasures that are always on", ("conceptzap", "Conceptzap")
    option = shared.OptionInfo([], label, gr.Dropdown, lambda: choices, section=section)
    shared.opts.add_option(ALWAYS, option)


script_callbacks.on_ui_settings(_settings)
