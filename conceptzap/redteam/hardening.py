"""Attack an erasure while it is made, and give it a gate that looks at the picture for what came through.

Behind the gate some of the anchor's states stand in place of the text's, so that nothing there has to
recognise it, and in unconditional rows some of the concept's, or beyond (`alone` rows at every
cross-attention): guidance then leads away from what the picture already shows of it, however late the gate
opens, as a negative prompt does. Such rows beside the text's stand behind the text gates, too, for what the
edits there leave of the concept in words that were searched for. A round searches, as textual inversion does
(Gal et al. 2022), for free tokens v in place of the concept's name, begun from words at random, with the
embeddings moved by gradients through the text encoder and the erased UNet:

    min_v || eps(x_t, t, c(v); edits) - eps_base(x_t, t, c) ||^2 + w sum_g relu(margin_g + slack)

x_t the base's own latents on the way to pictures of the concept c, g all gates: the text's, and the one that
looks; w is 0 in the first rounds, which only have to draw. What a round finds is drawn from noise. It is the
concept where the base itself says so (`training/recognition.py`), for the gate cannot tell what it does not
see; and it came through where no look of the first half had opened the gate. What is the concept joins what
the same kind of search has found before, which has a probe of its own (or, while it is little, that of the
mixtures below), so that the next search has to get past all of them (STEREO's rounds, Srivatsan et al. 2025,
with a probe in place of the weights). The probe of the concept as the base draws it sees none of that: tokens
that evade draw what is half something else, and dull it. A search may also find for every prompt tokens of
its own, in front of it, as UnlearnDiffAtk does, or instead of all of it, as P4D does. When every search in
turn has found nothing new, that is the end.

Before all that comes what takes no search: the name written wrongly, which a text gate is fitted for
(`slips.py`) and a probe; and mixtures of the concept's text states with those of others of its kind, since
what evades a gate draws what is half the concept; they have a probe of their own, too. Where the text does
open a gate, what is drawn has only to stay as what was erased looks: words that hide a half-erased concept
stand out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat

import torch
from torch import Tensor, nn

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Gate, Json
from conceptzap.redteam import slips, spelling, standing_in
from conceptzap.redteam.carrier import common
from conceptzap.report import Report
from conceptzap.runtime import gates, sight, texts
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import lessons, objectives, probe, recognition
from conceptzap.training.carrier import Carrier, split, tables
from conceptzap.training.lessons import Lesson
from conceptzap.training.probe import Seen

SHARES = (0.7, 0.6, 0.5)  # of the concept in a mixture
MIXED = 8  # others of its kind that it is mixed with
SLACK = 0.2  # by which a gate has to be shut, for a search to be content
INSTEAD, BEFORE, ALONE = "instead", "before", "alone"  # of the name; the whole prompt; all that is asked


@dataclass(frozen=True)
class Search:
    """`free` tokens instead of the concept's name, or for every prompt its own, before it or alone.

    `evade`: weight of the gates' margins.
    """

    free: int
    evade: float = 0.0
    place: str = INSTEAD
    lr: float = 0.03

    @property
    def own(self) -> bool:
        """Whether each prompt has tokens of its own."""
        return self.place != INSTEAD

    def carrier(self, base: Base, prompts: Sequence[str], names: Sequence[str]) -> Carrier:
        if self.place == ALONE:
            return Carrier.alone(base, len(prompts), self.free)
        if self.place == BEFORE:
            return Carrier.before(base, prompts, self.free)
        return Carrier.instead(base, prompts, names, self.free)


MISSPELT = Search(0)  # the name written wrongly, which takes no search
SEARCHES = (Search(1), Search(4), Search(4, 0.3), Search(4, 0.3, BEFORE, 0.06), Search(1, 0.3),
            Search(16, 0.3, ALONE, 0.1))  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How thoroughly: pictures that are looked at, rounds, steps of each search, and searches in turn.

    To the `others` come farther words, each in so many `wordings`, so many things in named styles, which no
    lesson crosses, and an eighth of the anchor's. `mixed` pictures are of mixtures. Without rounds nothing is
    searched for.
    """

    erased: int
    mixed: int
    rounds: int = 0
    steps: int = 0
    concept: int = 24
    others: int = 96  # each word of the keep set at least once: what is left out may open the gate
    wordings: int = 1
    styled: int = 48
    searches: tuple[Search, ...] = SEARCHES
    batch: int = 6
    own: int = 12  # prompts, where each gets tokens of its own
    found: int = 12  # pictures in which what was found is looked at


BUDGETS = {
    "quick": Budget(erased=16, mixed=27),
    "full": Budget(erased=24, mixed=54, rounds=18, steps=40),
}


@dataclass(frozen=True)
class Hardened:
    """The edits with what joined them, and what was found, concept by concept."""

    edits: tuple[Edit, ...]
    record: dict[str, Json]


def harden(
    base: Base, task: Task, edits: Sequence[Edit], budget: str, report: Report
) -> Hardened:
    """The edits and, for each concept of the task, rows behind its gates and one that saw it attacked."""
    more, record, every = [], {}, list(lessons.lessons(base, task, report))
    acting, baked = texts.baked(base, edits)
    for lesson in every:
        beside = [prompt for other in every if other is not lesson for prompt in other.prompts]
        case = _Case(base, acting, lesson, tuple(baked), BUDGETS[budget], report)
        own, record[lesson.concept] = _hardened(case, beside)
        more += own
    return Hardened((*edits, *more), {"budget": budget, "rounds": record})


@dataclass(frozen=True)
class _Case:
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
        anchors = {pair.concept: pair.anchor for pair in self.lesson.pairs}
        asked = self.base.encode(prompts), self.base.encode([anchors[prompt] for prompt in prompts])
        return recognition.rather(self.base, seen.ends, *asked, self.report.seed + seed)

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
        return tuple(gate for gate in self.text_gates if _told([gate], cond).any())


@dataclass
class _Known:
    """Pictures of the concept, of mixtures of it, of all else, and by kinds of search of what they found.

    The last so many of the others, `gone`, are what is drawn under the edits where one of the text gates is
    open that are `told` of the concept.
    """

    concept: Seen
    mixed: Seen
    others: Seen
    gone: int
    told: tuple[Gate, ...]
    found: dict[Search, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate = self._fitted()

    def learn(self, search: Search, found: Seen) -> None:
        self.found[search] = self.found[search].joined(found) if search in self.found else found
        self.gate = self._fitted()

    def _fitted(self) -> Gate:
        names, finds = [gate.name for gate in self.told], self.found.values()
        mixed = self.mixed.joined(*(few for few in finds if len(few) < probe.FOLDS))
        return probe.fit_gate([self.concept, mixed, *finds], self.others, self.gone, names)


def _hardened(case: _Case, beside: Sequence[str]) -> tuple[list[Edit], dict[str, Json]]:
    """What joins the edits, and what came of the rounds, column by column, one of each a round.

    `beside`: prompts of the concepts that are erased with it.
    """
    # 1. what the concept looks like on its way, and what else must not open the gate
    size, rounds, idle = case.size, [], 0
    prompts = objectives.subset(case.report.seed, case.lesson.prompts, size.concept)
    told, more = _told_of(case, prompts, beside)
    case = replace(case, edits=(*case.edits, *more))
    known = _watched(case, prompts, beside, told)
    # 2. look at what slips of the finger draw; then attack, look, fit again
    meant, wrong = _misspelt(case.lesson, prompts)
    rounds.append(_round(case, known, MISSPELT, meant, case.acting.encode(wrong)))
    for number in range(size.rounds):
        search = size.searches[number % len(size.searches)]
        asked = prompts[: size.own] if search.own else prompts
        cond = _search(case, known, search, asked, number)
        drawn = [index % len(asked) for index in range(size.found)]
        rounds.append(_round(case, known, search, [asked[i] for i in drawn], cond[drawn], number + 1))
        idle = 0 if rounds[-1]["through"] else idle + 1
        if idle == len(size.searches):
            break
    more.append(standing_in.instead(case.base, case.lesson, known.gate))
    return more, {name: [one[name] for one in rounds] for name in rounds[0]}


def _told_of(
    case: _Case, prompts: Sequence[str], beside: Sequence[str]
) -> tuple[tuple[Gate, ...], list[Edit]]:
    """The text gates that open for the concept, one for its wrong spelling among them; and rows behind them.

    Behind a gate that opens for another concept of the task, too, stand none. The one for wrong spelling
    opens where the first of the others does, in whose place it has them.
    """
    told, shared = case.opened(prompts), case.opened(beside)
    behind = [gate for gate in told if gate not in shared]
    hard = [gate for gate in behind if gate.kind == "match" and gate.params["threshold"] > 0]
    if hard and (gate := slips.fit_gate(case.acting, case.lesson, beside, hard[0], case.report.seed)):
        told = (*told, gate)
        behind[behind.index(hard[0])] = gate
    return told, [standing_in.beside(case.base, case.lesson, one) for one in behind]


def _misspelt(lesson: Lesson, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts, each as often as another, and the same with the concept's name written wrongly in them."""
    wrong = spelling.misspelt(lesson.concept)
    meant = [prompts[number % len(prompts)] for number in range(len(wrong))]
    return meant, [spelling.reworded(*one) for one in zip(meant, repeat(lesson.names), wrong)]


def _round(
    case: _Case, known: _Known, search: Search, asked: Sequence[str], cond: Cond, number: int = 0
) -> dict[str, Json]:
    """Look at what was found in place of prompts; what shows the concept is learned, what came of it told."""
    found = case.watch(cond, 2900 + 100 * number, "looking at what was found", ends=True)
    drawn = case.likeness(asked, found, number) > 0
    through = drawn & ~_opened(known.gate, found, _told(known.told, cond))
    if drawn.any():
        known.learn(search, found.rows(drawn))
    return {
        "tokens": search.free, "place": search.place, "evades": search.evade > 0, "n": len(found),
        "drawn": int(drawn.sum()), "through": int(through.sum()),
    }  # fmt: skip


def _watched(case: _Case, prompts: Sequence[str], beside: Sequence[str], told: tuple[Gate, ...]) -> _Known:
    """The concept as the base draws it, and under the edits what stays, the anchor and what is erased."""
    lesson, size, seed = case.lesson, case.size, case.report.seed
    # 1. the concept, and what stays: every word `beside` at least once
    label = f"looking at {lesson.concept}"
    concept = probe.watch(case.base, prompts, seed, case.report, label)
    mixed = probe.watch(case.base, _mixed(case, prompts), seed + 500, case.report, label)
    anchors = objectives.subset(seed, lesson.anchors, size.others // 8)
    farther = lesson.beside[: -(-len(lesson.beside) * size.wordings // lessons.WORDINGS)]
    styled = objectives.subset(seed, lessons.in_styles(case.base, lesson), size.styled)
    asked = [*lesson.kept(size.others), *farther, *styled, *anchors]
    others = case.watch(asked, 1000, "looking at what stays")
    # 2. what is erased, and what else is behind the same gates
    label = "looking at what is erased"
    gone = case.watch(prompts[: size.erased], 2000, label)
    opens = _told(told, case.acting.encode(list(beside))).tolist() if beside else []
    if heard := [one for one, open_ in zip(beside, opens, strict=True) if open_]:
        gone = gone.joined(case.watch(objectives.subset(seed, heard, size.erased), 2500, label))
    return _Known(concept, mixed, others.joined(gone), len(gone), told)


def _mixed(case: _Case, prompts: Sequence[str]) -> Cond:
    """Prompts on the way from the concept to others of its kind, and to its anchor, in their place."""
    lesson, size = case.lesson, case.size
    names = [lesson.anchor, *lessons.alike(case.base, lesson.concept, lesson.kind)[:MIXED]]
    meant = [prompts[i % len(prompts)] for i in range(size.mixed)]
    turns = [names[i // len(SHARES) % len(names)] for i in range(size.mixed)]
    other = [spelling.reworded(*one) for one in zip(meant, repeat(lesson.names), turns)]
    parts = 1 - torch.tensor(SHARES)[torch.arange(size.mixed) % len(SHARES)]
    return case.base.encode(meant).towards(case.base.encode(other), parts)


def _opened(gate: Gate, seen: Seen, told: Tensor) -> Tensor:
    """For which of n pictures, by texts that are `told` of or are not, it opens in half of its looks, [n]."""
    return (probe.looks(gate, seen, told)[: len(seen.times) // 2] > 0).any(0)


def _search(case: _Case, known: _Known, search: Search, prompts: Sequence[str], number: int) -> Cond:
    """Text states, by the base that acts, of prompts with what was found in them.

    Text gates have a straight-through gradient: where they are shut, the concept is drawn.
    """
    base, size, seen, gate = case.base, case.size, known.concept, known.gate
    carrier, asked = search.carrier(case.acting, prompts, case.lesson.names), base.encode(list(prompts))
    generator = torch.Generator().manual_seed(case.report.seed * 7919 + number)
    v = nn.Parameter(_start(base, case.lesson, len(prompts) if search.own else 1, carrier.free, generator))
    adam = torch.optim.Adam([v], lr=search.lr, foreach=False, fused=False)
    label = f"attacking, round {number + 1} of {size.rounds}"
    for _ in case.report.count(range(size.steps), size.steps, label):
        rows = torch.randint(len(prompts), (size.batch,), generator=generator)
        steps = torch.randint(len(seen.times), (size.batch,), generator=generator)
        x, t = seen.latents[steps, rows].to(base.device), seen.times[steps].long()
        with torch.no_grad():
            target = base.predict(x, t, asked[rows])  # [batch, c, h, w]
        with torch.enable_grad():
            free = v[rows] if search.own else v.expand(size.batch, -1, -1)  # [batch, free, d]
            cond = carrier.rows(rows).states(split(base, free))
            with gates.straight_through(), attached(base, case.edits), probe.looking(base) as looks:
                error = (base.predict(x, t, cond) - target).pow(2).mean()
            pairs = torch.cat([looks[0], seen.without[steps, rows].to(looks[0])], -1)  # [batch, 2 channels]
            margin = sight.scores(gate, pairs, t.float().cpu(), _told(known.told, cond))
            margin = margin - gate.params["threshold"]
            margins = [*(gates.margins(one, cond.states) for one in case.text_gates), margin]
            loss = error + search.evade * _shutting(margins)
            adam.zero_grad()
            torch.autograd.backward(loss, inputs=[v])
        adam.step()
    with torch.no_grad():
        return carrier.states(split(base, v.detach().expand(len(prompts), -1, -1)))


def _start(base: Base, lesson: Lesson, n: int, free: int, generator: torch.Generator) -> Tensor:
    """Embeddings of words at random, all encoders' side by side: [n, free, d]."""
    words = common(base, lesson.names).nonzero()[:, 0]
    joined = torch.cat(tables(base), -1)  # [vocabulary, d]
    return joined[words[torch.randint(len(words), (n, free), generator=generator)]]


def _shutting(margins: Sequence[Tensor]) -> Tensor:
    """How far gates are from shut, mean over rows of their margins [rows], in all."""
    return sum((margin + SLACK).relu().mean() for margin in margins)


@torch.no_grad()
def _told(told: Sequence[Gate], cond: Cond) -> Tensor:
    """For which of n texts one of these gates is open that is hard and reads the whole text, [n]."""
    margins = [gates.margins(gate, cond.states) for gate in told if gate.kind == "match"]
    return (torch.stack(margins) > 0).any(0).cpu() if margins else torch.zeros(len(cond), dtype=torch.bool)

