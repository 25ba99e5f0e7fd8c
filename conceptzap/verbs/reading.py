"""What the gates of erasures read in a prompt: word by word, and how far each is from opening them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.base.bpe import END, WORD_END, spelled
from conceptzap.edit import Edit
from conceptzap.runtime import gates

REST = "(end)"  # the end of the text and the padding, whose states have read all of it
LEAST = 1e-6


@torch.no_grad()
def margins(base: Base, edits: Iterable[Edit], prompt: str) -> list[tuple[str, float | None]]:
    """Each word of a prompt as it is read, cut where it is cut, with its reading, then the end of the text.

    Above 0 the word alone opens a gate: its score over the threshold, in thresholds, at most 1 either way
    and the largest of all gates. None where no edit stands behind a gate that reads the text.
    """
    found = {gate.name: gate for edit in edits for gate in edit.gates if gate.kind in gates.TEXT}
    states = base.encode([prompt]).states  # [1, length, width]
    pieces = base.tokenizers[0].convert_ids_to_tokens(base.token_ids([prompt])[0][0].tolist())
    if not found:
        return [(word, None) for word, _ in _words(base, pieces)]
    each = [_relative(gate.params["threshold"], gates.scores(gate, states)[0]) for gate in found.values()]
    most = torch.stack(each).amax(0).clamp(-1, 1)  # [length]
    return [(word, float(most[places].max())) for word, places in _words(base, pieces)]


def _relative(threshold: float, scores: Tensor) -> Tensor:
    return (scores - threshold) / max(abs(threshold), LEAST)


def _words(base: Base, pieces: list[str]) -> list[tuple[str, slice]]:
    """Words with their positions; the start token, which is the same in every text, is left out."""
    end = pieces.index(END, 1)
    words, first = [], 1
    for place in range(1, end):
        if pieces[place].endswith(WORD_END) or place == end - 1:
            words.append((spelled(pieces[first : place + 1]), slice(first, place + 1)))
            first = place + 1
    return [*words, (REST, slice(end, len(pieces)))]
