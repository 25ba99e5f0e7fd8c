"""A concept under attack: what is searched for, how thoroughly, and what is known of it so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Gate, content_name
from conceptzap.report import Report
from conceptzap.runtime import gates
from conceptzap.training import probe, recognition
from conceptzap.training.lessons import Lesson
from conceptzap.training.probe import Seen

# tokens in place of the name, before the whole prompt, or all that is asked
INSTEAD, BEFORE, ALONE = "instead", "before", "alone"
AROUND, SHIFTED, DERIVED = "around", "shifted", "derived"  # states that no tokens have
VERSION = 1  # one more whenever hardening comes to something else by the same budget
GIVEN = (SHIFTED, DERIVED)  # which take no search


@dataclass(frozen=True)
class Search:
    """`free` tokens instead of the concept's name, or for every prompt its own, before it or alone.

    Without tokens it is of text states: around the concept's, a prompt's moved along the concept's direction
    (`SHIFTED`), or what changed projections turn into the concept's (`DERIVED`). `evade`: weight of the
    gates' margins.
    """

    free: int
    evade: float = 0.0
    place: str = INSTEAD
    lr: float = 0.03

    @property
    def own(self) -> bool:
        """Whether each prompt has tokens, or states, of its own."""
        return self.place != INSTEAD

    @property
    def kind(self) -> Hashable:
        """Finds of one kind share a probe: of a search that evades, of all that do not.

        What does not evade draws the concept as it is; what does, what is half something else.
        """
        return self if self.evade else None


MISSPELT = Search(0)  # the name written wrongly, which takes no search
SEARCHES = (Search(1), Search(4), Search(4, 0.3), Search(4, 0.3, BEFORE, 0.06), Search(1, 0.3),
            Search(16, 0.3, ALONE, 0.1), Search(0, 0.1, AROUND, 0.2), Search(0, place=SHIFTED),
            Search(0, place=DERIVED))  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How thoroughly: pictures that are looked at, steps of each search, searches, and so many turns of them.

    To the `others` come farther words, each in so many `wordings`, so many things in named styles, which no
    lesson crosses, and an eighth of the anchor's. `mixed` pictures are of mixtures. Without turns nothing is
    searched for.
    """

    erased: int
    mixed: int
    turns: int = 0
    steps: int = 0
    concept: int = 24
    others: int = 96  # each word of the keep set at least once: what is left out may open the gate
    wordings: int = 1
    styled: int = 48
    searches: tuple[Search, ...] = SEARCHES
    batch: int = 6
    own: int = 12  # prompts, where each gets tokens of its own
    found: int = 12  # pictures in which what was found is looked at

    @property
    def order(self) -> list[Search]:
        """What is searched for, round by round; what takes no search comes to the same in every turn."""
        every = list(self.searches) * self.turns
        return [one for at, one in enumerate(every) if at < len(self.searches) or one.place not in GIVEN]

    @property
    def digest(self) -> str:
        """Of the budget, and of what is made of it, for whoever asks whether a file was hardened alike."""
        settings = dataclasses.asdict(replace(self, searches=tuple(self.order)))
        return content_name({"version": VERSION, **settings}, {})


@dataclass(frozen=True)
class Case:
    """A concept under attack: `base` knows it, `acting` has the erasure's part in its text encoder."""

    base: Base
    acting: Base
    lesson: Lesson
    edits: tuple[Edit, ...]
    size: Budget
    report: Report

    def watch(self, asked: Sequence[str] | Cond, seed: int, label: str, ends: bool = False) -> Seen:
        """Pictures under the edits; see `probe.watch`."""
        return probe.watch(self.acting, asked, self.report.seed + seed, self.report, label, self.edits, ends)

    def likeness(self, prompts: Sequence[str], seen: Seen, seed: int) -> Tensor:
        """How much more the concept than its anchor pictures are, drawn in place of these prompts': [n]."""
        asked = self.base.encode(prompts), self.base.encode(self.anchors(prompts))
        return recognition.rather(self.base, seen.ends, *asked, self.report.seed + seed)

    def anchors(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of the anchor in place of these of the concept."""
        anchors = {pair.concept: pair.anchor for pair in self.lesson.pairs}
        return [anchors[prompt] for prompt in prompts]

    @property
    def text_gates(self) -> list[Gate]:
        """The gates of the edits that read text, each once."""
        every = (gate for edit in self.edits for gate in edit.gates if gate.kind in gates.TEXT)
        return list({gate.name: gate for gate in every}.values())

    def opened(self, prompts: Sequence[str]) -> tuple[Gate, ...]:
        """Those of them that some of the prompts open."""
        if not prompts:
            return ()
        cond = self.acting.encode(list(prompts))
        return tuple(gate for gate in self.text_gates if told_by([gate], cond).any())


@dataclass
class Known:
    """Pictures of the concept, of mixtures of it, of all else, and by kinds of search of what they found.

    The last so many of the others, `gone`, are what is drawn under the edits where one of the text gates is
    open that are `told` of the concept.
    """

    concept: Seen
    mixed: Seen
    others: Seen
    gone: int
    told: tuple[Gate, ...]
    found: dict[Hashable, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate = self._fitted()

    def learn(self, search: Search, found: Seen) -> None:
        before = self.found.get(search.kind)
        self.found[search.kind] = found if before is None else before.joined(found)
        self.gate = self._fitted()

    def _fitted(self) -> Gate:
        names, finds = [gate.name for gate in self.told], self.found.values()
        mixed = self.mixed.joined(*(few for few in finds if len(few) < probe.FOLDS))
        return probe.fit_gate([self.concept, mixed, *finds], self.others, self.gone, names)


@torch.no_grad()
def told_by(told: Sequence[Gate], cond: Cond) -> Tensor:
    """For which of n texts one of these gates is open that is hard and reads the whole text, [n]."""
    margins = [gates.margins(gate, cond.states) for gate in told if gate.kind == "match"]
    return (torch.stack(margins) > 0).any(0).cpu() if margins else torch.zeros(len(cond), dtype=torch.bool)
