"""The program as a process of its own that starts at once: a server has imported all that is heavy."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# forked from a process that has done nothing but import these
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "conceptzap.api", "conceptzap.cli", "conceptzap.verbs.erasing", "conceptzap.verbs.evaluating",
    "conceptzap.runtime.sampler", "conceptzap.base", "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.schedulers.scheduling_ddim",
])  # fmt: skip

# before a program for which the hub's client has to read its variables anew, as it does when it is imported
FRESH = """
import sys
for name in [name for name in sys.modules if name.startswith(("huggingface_hub", "conceptzap"))]:
    del sys.modules[name]
"""


class Program:
    """`conceptzap WORDS...` after `code`, under `environment` beside this one's; stdin is a pipe."""

    def __init__(
        self, code: str, *words: object, stdin: str = "", cwd: Path | None = None, **environment: str
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.paths = [Path(self.folder.name, name) for name in ("out", "err")]
        reading, writing = multiprocessing.Pipe(duplex=False)
        given = [code, list(map(str, words)), str(cwd or Path.cwd()), {**os.environ, **environment}]
        self.process = SERVER.Process(target=_run, args=(*given, reading, *map(str, self.paths)))
        self.process.start()
        reading.close()
        os.write(writing.fileno(), stdin.encode())
        writing.close()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> int:
        """SIGKILL; what it ended with, -9 if it was still there."""
        self.process.kill()
        return self.wait()

    def wait(self) -> int:
        """Its exit code; what it said is in `out` and `err` then."""
        self.process.join()
        self.out, self.err = (path.read_bytes().decode() for path in self.paths)
        self.folder.cleanup()
        return self.process.exitcode


def _run(
    code: str, words: list[str], cwd: str, environment: dict[str, str], stdin: Any, *paths: str
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(stdin.fileno(), 0)
    stdin.close()
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    # as Python opens them when it starts
    encoding = environment.get("PYTHONIOENCODING") or "utf-8"
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (
        open(number, "w", encoding=encoding, closefd=False, errors="backslashreplace" if number == 2 else None)
        for number in (1, 2)
    )
    exec(compile(code, "before the program", "exec"), {})  # noqa: S102
    from conceptzap.cli import main

    sys.exit(main(words))
