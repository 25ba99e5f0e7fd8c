"""Write one file from several erasures.

    conceptzap stack van-gogh.lprompt.safetensors church.lprompt.safetensors -o both
    conceptzap stack *.lprompt.safetensors -o all.lprompt.safetensors --json

The order of the files makes no difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conceptzap.cli import _options as options

if TYPE_CHECKING:
    from conceptzap.edit import Erasure


def run(
    paths: options.Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")
    ],
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.format import atomic, naming
    from conceptzap.terminal import show

    target = naming.erasure_path((), output)
    atomic.check_writable(target, force)
    parts = [api.load(path) for path in paths]
    erasure = api.stack(parts)
    digest = api.save(erasure, target, force=force)
    for text in _odd(parts, erasure):
        show.warn(text)
    record = show.stack_record(target, digest, erasure.header)
    show.emit("stack", record) if as_json else show.stacked(record)


def _odd(parts: Sequence[Erasure], whole: Erasure) -> list[str]:
    """What is allowed in a stack and seldom meant."""
    erasing = {part.digest: part.header for part in parts if part.with_role("erase")}
    inside = {digest for head in erasing.values() for digest in head.parents}
    apart = [head.concepts for digest, head in erasing.items() if digest not in inside]
    counts = Counter(concept for concepts in apart for concept in set(concepts))
    counts |= Counter(whole.header.concepts)
    twice = sorted(concept for concept, count in counts.items() if count > 1)
    odd = [f"{concept!r} is erased more than once" for concept in twice]
    if not whole.with_role("erase"):
        odd.append("this stack holds keys only: it erases nothing")
    return odd
