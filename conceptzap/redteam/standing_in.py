"""What stands behind the gates: states of the anchor, and of the concept in unconditional rows.

Nothing of it has to recognise the text. Guidance leads away from what stands in the unconditional rows, so
from what a picture shows of the concept already, as from a negative prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from conceptzap.base import CROSS, Base
from conceptzap.edit import Edit, Gate, Json
from conceptzap.training.lessons import Lesson
from conceptzap.training.wordings import Pair

ROWS = 8  # states of the anchor that stand in place of the text or beside it, and as many of the concept
WORDS = 2  # of them those of its last words; as much is padding, which has a say in what words draw, too
AWAY = 1.5  # where guidance leads away from, on the way from them to the concept's, 1 being these


def beside(base: Base, lesson: Lesson, gate: Gate) -> Edit:
    """States of the anchor beside the text's, and of the concept in rows without a prompt."""
    return _rows(base, lesson, gate, 1.0, {})


def instead(base: Base, lesson: Lesson, gate: Gate) -> Edit:
    """States of the anchor in place of the text's; guidance leads away from what a picture shows already."""
    return _rows(base, lesson, gate, AWAY, {"alone": True})


def _rows(base: Base, lesson: Lesson, gate: Gate, away: float, params: Mapping[str, Json]) -> Edit:
    """States of the plainest prompts for both, [ROWS, width] each; `away`: as `AWAY`."""
    plain = lesson.pairs[1] if len(lesson.pairs) > 1 else Pair(lesson.concept, lesson.anchor)
    anchor, concept = _few(base, plain.anchor), _few(base, plain.concept)  # [ROWS, width] each
    rows = {"prompt": anchor, "without": anchor + away * (concept - anchor)}
    half = {slot: states.to(torch.float16) for slot, states in rows.items()}
    return Edit("tokens", base.sites(CROSS), half, params, (gate,))


def _few(base: Base, text: str) -> Tensor:
    """A text's states, [ROWS, width]: the start, its last words, its end and padding at equal distances."""
    states = base.encode([text]).states[0]
    end = min(base.token_count(text), len(states) - 2) + 1
    few = [0, *range(max(1, end - WORDS), end + 1)]
    padding = torch.linspace(end, len(states) - 1, ROWS - len(few) + 1)[1:].round().long()
    return states[[*few, *padding.tolist()]].float().cpu()
