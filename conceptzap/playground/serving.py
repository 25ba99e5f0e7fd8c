"""The page's server: this machine alone, no telemetry, nothing from elsewhere."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from conceptzap.errors import ResourceError, UsageError
from conceptzap.format import naming

HOST = "127.0.0.1"
EXTRA = 'pip install "conceptzap[ui]"'
# a page that asks anybody else for anything is not shown it
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'"
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Served(Protocol):
    """A page that is being served."""

    local_url: str

    def close(self) -> None:
        """End it."""


def ui(
    folder: Path | str = ".",
    *,
    base: str = "demo", prediction: str | None = None,
    device: str = "auto", dtype: str = "auto",
    port: int | None = None,
    block: bool = True,
    browser: bool = False,
    told: Callable[[str], object] = print,
) -> Served:  # fmt: skip
    """A page to play with over the erasures of `folder`, on this machine's `port` (the first free one).

    `told` is given its address. Without `block` what comes back has `local_url` and `close()`. Raises
    `ResourceError` where gradio is not installed or the port is taken, `UsageError` for no folder.
    """
    folder = naming.place(folder)
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is no folder", "name one that has erasures, or will have some")
    os.environ.update(SILENT)
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="conceptzap-ui-")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    try:
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ResourceError(f"the page needs gradio: {error}", EXTRA) from error
    from conceptzap.playground import board, view, work

    page = board.page(work.Desk(folder, device, dtype, prediction), base)
    theme = gr.themes.Base(primary_hue="red", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500", button_primary_background_fill="*primary_700",
    )  # fmt: skip
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(_Policy)]
    try:
        page.launch(
            server_name=HOST, server_port=port, share=False, inbrowser=browser, quiet=True, footer_links=[],
            ssr_mode=False, prevent_thread_lock=True, theme=theme, css=view.STYLE, pwa=False,
            mcp_server=False, app_kwargs={"middleware": guards}, max_file_size=0, show_error=False,
        )  # fmt: skip
    except OSError as error:
        hint = "name another --port, or none"
        raise ResourceError(f"the page cannot be served: {error}", hint) from error
    told(page.local_url)
    if block:
        _until_interrupted(page)
    return cast(Served, page)


def _until_interrupted(page: Any) -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


class _Policy:
    """Adds the policy to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, answer)
