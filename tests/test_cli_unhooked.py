"""Through the command line: whichever hook is lost, and whenever, the answer is exit 6 and no picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import edits as some
import pytest
from command import conceptzap, contents

from conceptzap import base as bases
from conceptzap import format
from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.runtime.attach import Attachment
from conceptzap.testing import save_tiny, tiny

SUFFIX = ".lprompt.safetensors"
# every op, and with them every kind of hook: those that write an output and those that do not
KINDS: dict[str, Callable[[Base], Iterable[Edit]]] = {
    "gated": some.eraser,
    "written": lambda base: [some.key_values(base), some.delta(base)],
    "layers": lambda base: [some.adapter(base), some.low_rank(base, some.CONVS), some.mask(base)],
}
SELF_TEST, DRAWING = 0, 1  # attachments of one picture, in their order


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unhooked")
    save_tiny(folder / "base")
    base = tiny("sd1")
    for kind, make in KINDS.items():
        format.save(some.erasure(base, tuple(make(base))), folder / f"{kind}{SUFFIX}")
    return folder


@pytest.fixture(scope="module")
def shared(world: Path) -> Iterator[Base]:
    """The base that every run uses, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        loaded = functools.cache(bases.load_base)
        patch.setattr(bases, "load_base", loaded)
        yield loaded("base", "auto", "auto", None)


class Loser:
    """Attachments as they are made, from `first` on without their handle of number `lost`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first, self.lost = 0, -1
        self.handles: list[int] = []
        real = Attachment.__init__

        def attach(attachment: Attachment, *given: Any) -> None:
            real(attachment, *given)
            self.handles.append(len(attachment._handles))
            if self.lost >= 0 and len(self.handles) > self.first:
                attachment._handles[self.lost].remove()

        monkeypatch.setattr(Attachment, "__init__", attach)

    def draw(self, kind: str, prompt: str, first: int = 0, lost: int = -1) -> Any:
        self.first, self.lost, self.handles = first, lost, []
        words = ("--steps", "2", "--guidance", "2", "--base", "base", "-o", "new.png")
        return conceptzap("generate", prompt, "--with", f"{kind}{SUFFIX}", *words)


@pytest.mark.parametrize("first", [SELF_TEST, DRAWING], ids=["from the start", "after the test"])
@pytest.mark.parametrize("prompt", [some.ASKED[1], some.OTHER[1]], ids=["asked", "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_single_hook_lost_leaves_no_picture(
    kind: str, prompt: str, first: int, shared: Base, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each handle of each attachment in turn; also where no gate opens for the prompt."""
    loser, before = Loser(monkeypatch), contents(world)
    assert loser.draw(kind, prompt).code == 0 and len(loser.handles) == 2
    (world / "new.png").unlink()
    count = loser.handles[first]
    assert loser.handles == [count] * 2 and count >= 2 + len(KINDS[kind](shared))
    for number in range(count):
        answer = loser.draw(kind, prompt, first, number)
        assert answer.code == 6 and "Traceback" not in answer.error, (number, answer)
        assert len(loser.handles) == first + 1, "it went on after the loss"
        assert contents(world) == before and some.hooks(shared) == 0
