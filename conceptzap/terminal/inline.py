"""Pictures in the terminal itself, where it is one that can: kitty, Ghostty, iTerm2, WezTerm."""

from __future__ import annotations

import base64
import os
import sys
from contextlib import suppress
from pathlib import Path

from conceptzap.terminal import speech

ROWS = 12  # lines of text that a picture takes
LARGEST = 4 * 2**20  # bytes
CHUNK = 4096  # base64 characters in one escape of kitty's


def show(path: Path | str) -> None:
    """Draw a PNG on stderr, small, if somebody watches there and the terminal can; else nothing."""
    draw = {"kitty": _kitty, "iterm": _iterm}.get(protocol())
    if draw is None:
        return
    with suppress(OSError):
        if os.path.getsize(path) <= LARGEST:
            speech.settle()
            print(draw(Path(path).read_bytes()), file=sys.stderr, flush=True)


def protocol() -> str:
    """How pictures are written here, by what the terminal says of itself: kitty, iterm or ""."""
    env = os.environ
    plain = env.get("TERM") == "dumb" or any(env.get(name) for name in ("CI", "NO_COLOR", "TMUX", "STY"))
    watched = sys.stderr.isatty() and sys.stdout.isatty()
    if plain or not watched or not (speech.wants_progress() and speech.wants_colour()):
        return ""
    program = env.get("TERM_PROGRAM", "")
    if env.get("KITTY_WINDOW_ID") or env.get("TERM") == "xterm-kitty" or program == "ghostty":
        return "kitty"
    return "iterm" if program in ("iTerm.app", "WezTerm") else ""


def _kitty(data: bytes) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: a PNG (f=100), shown (a=T), quietly (q=2)."""
    text = base64.b64encode(data).decode()
    chunks = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
    first = f"a=T,f=100,q=2,r={ROWS},"
    return "".join(
        f"\x1b_G{first if not n else ''}m={int(n + 1 < len(chunks))};{chunk}\x1b\\"
        for n, chunk in enumerate(chunks)
    )


def _iterm(data: bytes) -> str:
    """https://iterm2.com/documentation-images.html: one escape that holds a file."""
    facts = f"inline=1;size={len(data)};height={ROWS};preserveAspectRatio=1"
    return f"\x1b]1337;File={facts}:{base64.b64encode(data).decode()}\a"
