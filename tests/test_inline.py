"""Pictures in terminals that can show them, and nothing at all for those that cannot."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from conceptzap.terminal import inline, speech

VARIABLES = ("KITTY_WINDOW_ID", "TERM", "TERM_PROGRAM", "CI", "NO_COLOR", "TMUX", "STY")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal on both streams, of no known kind."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    speech.begin()
    screen = Terminal()
    monkeypatch.setattr(inline, "sys", SimpleNamespace(stderr=screen, stdout=Terminal()))
    return screen


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_kitty(screen: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    inline.show(picture)
    chunks = re.findall("\x1b_G(.*?);(.*?)\x1b\\\\", screen.getvalue())
    assert base64.b64decode("".join(data for _, data in chunks)) == picture.read_bytes()
    assert all(len(data) <= 4096 for _, data in chunks) and len(chunks) == 4
    assert chunks[0][0].startswith("a=T,f=100,q=2,r=12,m=1") and chunks[-1][0] == "m=0"


@pytest.mark.parametrize("program", ["iTerm.app", "WezTerm"])
def test_iterm(program: str, screen: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM_PROGRAM", program)
    inline.show(picture)
    found = re.fullmatch("\x1b]1337;File=inline=1;size=10240;[^:]*:(.*)\a\n", screen.getvalue())
    assert found and base64.b64decode(found[1]) == picture.read_bytes()


@pytest.mark.parametrize(
    "setting", [{}, {"CI": "1"}, {"NO_COLOR": "1"}, {"TMUX": "x"}, {"TERM": "dumb"}], ids=str
)
def test_nothing_where_it_cannot(
    setting: dict[str, str], screen: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**({"TERM_PROGRAM": "iTerm.app"} if setting else {}), **setting}.items():
        monkeypatch.setenv(name, value)
    inline.show(picture)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nothing_in_a_pipe(
    stream: str, screen: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    monkeypatch.setattr(inline.sys, stream, io.StringIO())
    inline.show(picture)
    assert screen.getvalue() == inline.sys.stderr.getvalue() == ""


@pytest.mark.parametrize("wish", [{"quiet": True}, {"progress": False}, {"colour": False}], ids=str)
def test_nothing_where_it_is_not_wanted(
    wish: dict[str, bool], screen: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    speech.ask(**wish)
    inline.show(picture)
    inline.show(picture.with_name("none.png"))
    speech.begin()
    assert screen.getvalue() == ""
