"""The real command line, run in this process, and what it left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptzap.cli import main


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON object it must be."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line an error is answered with."""
        assert self.out == "", self.out
        assert self.err.count("\n") == 1 and self.err.startswith("error: "), self.err
        return self.err.removeprefix("error: ").strip()


class Stream(io.TextIOWrapper):
    """A text stream over memory, as stdout is one over a descriptor."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode("utf-8", "surrogateescape")


def conceptzap(*words: object) -> Answer:
    """`conceptzap WORDS...`: the entry point of the installed program."""
    out, err = Stream(), Stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([os.fspath(w) if isinstance(w, Path) else str(w) for w in words])
    return Answer(code, out.text(), err.text())


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file under `folder` with its time of change and bytes, every folder with no bytes."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns if path.is_file() else 0,
                                        path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


def refused(folder: Path, code: int, message: str, *words: object) -> None:
    """Both ways of saying it: one line on stderr, one object on stdout; the folder is as it was."""
    before = contents(folder)
    answer = conceptzap(*words)
    assert answer.code == code, answer
    assert "Traceback" not in answer.err and message in answer.error and answer.error.isprintable()
    spoken = conceptzap(*words, "--json")
    assert spoken.code == code and spoken.err == ""
    assert spoken.json["error"]["code"] == code and message in json.dumps(spoken.json, ensure_ascii=False)
    assert contents(folder) == before
