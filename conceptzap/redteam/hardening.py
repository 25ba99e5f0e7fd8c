"""Attack an erasure while it is made, and give it a gate that looks at the picture for what came through.

Behind the gate the anchor's states stand in place of the text's (`alone` rows at every
cross-attention), so that nothing behind it has to recognise the text. A round searches, as textual
inversion does (Gal et al. 2022), for free tokens v in place of the concept's name, begun from words at
random, with the embeddings moved by gradients through the text encoder and the erased UNet:

    min_v || eps(x_t, t, c(v); edits) - eps_base(x_t, t, c) ||^2 + w sum_g relu(margin_g + slack)

x_t the base's own latents on the way to pictures of the concept c, g all gates: the text's, and the one that
looks; w is 0 in the rounds that only have to draw, and those that evade go on from there. What a round finds
is drawn from noise. It shows the concept where the base itself says so (`training/recognition.py`): where it
is more than `SHOWN` of the way from what was erased to the concept; for the gate cannot tell what it does not
see. And it came through where no look of the first half had opened the gate.
What shows it joins what the same number of tokens has come to before, which has a probe of its own, so that
the next search has to get past all of them (STEREO's rounds, Srivatsan et al. 2025, with a probe in place of
the weights). The probe of the concept as the base draws it sees none of that: tokens that evade draw what is
half something else, and dull it. A search may also put tokens in front of the name, for every prompt its own,
as UnlearnDiffAtk and P4D do. When every search in turn has found nothing new, that is the end.

Before all that comes what takes no search, the name written wrongly. And where the text does open a gate,
what is drawn has only to stay as what was erased looks: words that hide a half-erased concept stand out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor, nn

from conceptzap.base import CROSS, Base, Cond
from conceptzap.edit import Edit, Gate, Json
from conceptzap.redteam import spelling
from conceptzap.redteam.carrier import common
from conceptzap.report import Report
from conceptzap.runtime import gates, sight, texts
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import lessons, objectives, probe, recognition
from conceptzap.training.carrier import Carrier, split, tables
from conceptzap.training.lessons import Lesson
from conceptzap.training.probe import Seen

ROWS = 8  # the anchor's states that stand in place of the text
SHOWN = 0.3  # of the way from what was erased to the concept: what the base says from there on shows it
SLACK = 0.2  # by which a gate has to be shut, for a search to be content


@dataclass(frozen=True)
class Search:
    """`free` tokens in place of the concept's name, or for every prompt its own `before` it.

    `evade`: weight of the gates' margins.
    """

    free: int
    evade: float = 0.0
    before: bool = False
    lr: float = 0.03

    def carrier(self, base: Base, prompts: Sequence[str], names: Sequence[str]) -> Carrier:
        if self.before:
            return Carrier.before(base, prompts, self.free)
        return Carrier.instead(base, prompts, names, self.free)


MISSPELT = Search(0)  # the name written wrongly, which takes no search
SEARCHES = (Search(1), Search(4), Search(4, 0.3), Search(4, 0.3, True, 0.06), Search(1, 0.3))


@dataclass(frozen=True)
class Budget:
    """How thoroughly: pictures that are looked at, rounds, steps of each search, and searches in turn.

    To the `others` come those of farther words, and an eighth of the anchor's.
    """

    concept: int
    others: int
    erased: int
    rounds: int
    steps: int
    searches: tuple[Search, ...] = SEARCHES
    batch: int = 6
    own: int = 12  # prompts, where each gets tokens of its own
    found: int = 36  # pictures in which what was found is looked at


BUDGETS = {
    "quick": Budget(concept=24, others=256, erased=24, rounds=15, steps=40),
    "full": Budget(concept=64, others=512, erased=32, rounds=25, steps=80),
}


@dataclass(frozen=True)
class Hardened:
    """The edits, those behind the gates that look among them, and what was found, concept by concept."""

    edits: tuple[Edit, ...]
    record: dict[str, Json]


def harden(
    base: Base, task: Task, edits: Sequence[Edit], budget: str, report: Report
) -> Hardened:
    """The edits and, for each concept of the task, rows behind a gate that has seen it attacked."""
    size, more, record = BUDGETS[budget], [], {}
    every = list(lessons.lessons(base, task, report))
    for lesson in every:
        beside = [prompt for other in every if other is not lesson for prompt in other.prompts]
        new, rounds = _hardened(base, lesson, beside, edits, size, report)
        more += new
        record[lesson.concept] = rounds
    return Hardened((*edits, *more), {"budget": budget, "rounds": record})


@dataclass
class _Known:
    """Pictures of the concept, of everything else, and of what was found, by the tokens and where they stand.

    The last so many of the others, `gone`, are what is drawn under the edits where one of the text gates is
    open that are `told` of the concept. Above `shown` the base says that a picture shows it. `drew`: what a
    search came to that evades nothing, by its tokens.
    """

    concept: Seen
    others: Seen
    gone: int
    told: tuple[Gate, ...]
    shown: float = 0.0
    found: dict[tuple[int, bool], Seen] = field(default_factory=dict)
    drew: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate = self._fitted()

    def learn(self, search: Search, found: Seen) -> None:
        kind = search.free, search.before
        self.found[kind] = self.found[kind].joined(found) if kind in self.found else found
        self.gate = self._fitted()

    def _fitted(self) -> Gate:
        names, few = [gate.name for gate in self.told], probe.FOLDS
        rare = [seen for seen in self.found.values() if len(seen) < few]  # these share one
        groups = [seen for seen in self.found.values() if len(seen) >= few]
        groups += [rare[0].joined(*rare[1:])] if rare else []
        return probe.fit_gate([self.concept, *groups], self.others, self.gone, names)


def _hardened(
    base: Base, lesson: Lesson, beside: Sequence[str], edits: Sequence[Edit], size: Budget, report: Report
) -> tuple[list[Edit], list[Json]]:
    """The rows behind the gate, and the record; `beside`: prompts of the concepts that are erased with it."""
    # 1. what the concept looks like on its way, and what else must not open the gate
    acting, edits = texts.baked(base, edits)
    prompts = objectives.subset(report.seed, lesson.prompts, size.concept)
    known = _watched(base, acting, lesson, prompts, beside, edits, size, report)
    # 2. look at what slips of the finger draw; then attack, look, fit again
    meant, wrong = _misspelt(lesson, prompts)
    rounds = [_round(base, acting, lesson, MISSPELT, meant, acting.encode(wrong), known, edits, report)]
    idle = 0
    for number in range(size.rounds):
        search = size.searches[number % len(size.searches)]
        asked = prompts[: size.own] if search.before else prompts
        cond = _search(base, acting, lesson, asked, known, edits, search, size, number, report)
        drawn = [index % len(asked) for index in range(size.found)]
        asked, cond = [asked[index] for index in drawn], cond[drawn]
        rounds.append(_round(base, acting, lesson, search, asked, cond, known, edits, report, number + 1))
        idle = 0 if rounds[-1]["through"] else idle + 1
        if idle == len(size.searches):
            break
    return [_stand_in(base, lesson, known.gate)], rounds


def _misspelt(lesson: Lesson, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts, each as often as another, and the same with the concept's name written wrongly in them."""
    wrong = spelling.misspelt(lesson.concept)
    meant = [prompts[number % len(prompts)] for number in range(len(wrong))]
    return meant, [spelling.reworded(*one) for one in zip(meant, repeat(lesson.names), wrong)]


def _round(
    base: Base, acting: Base, lesson: Lesson, search: Search, asked: Sequence[str], cond: Cond, known: _Known,
    edits: Sequence[Edit], report: Report, number: int = 0,
) -> dict[str, Json]:  # fmt: skip
    """Look at what was found in place of prompts; what shows the concept is learned, what came of it told."""
    label, seed = "looking at what was found", report.seed + 2900 + 100 * number
    found = probe.watch(acting, cond, seed, report, label, edits, ends=True)
    drawn = _likeness(base, lesson, asked, found, report.seed + number) > known.shown
    through = drawn & ~_opened(known.gate, found, _told(known.told, cond))
    if drawn.any():
        known.learn(search, found.rows(drawn))
    return {
        "tokens": search.free, "before": search.before, "evades": search.evade > 0, "n": len(found),
        "drawn": round(float(drawn.float().mean()), 3),
        "through": round(float(through.float().mean()), 3),
    }  # fmt: skip


def _watched(
    base: Base, acting: Base, lesson: Lesson, prompts: Sequence[str], beside: Sequence[str],
    edits: Sequence[Edit], size: Budget, report: Report,
) -> _Known:  # fmt: skip
    """The concept as the base draws it, and under the edits what stays, the anchor and what is erased."""
    seed, anchors = report.seed, objectives.subset(report.seed, lesson.anchors, size.others // 8)
    shut = [*lesson.kept(size.others), *lesson.beside, *anchors]  # beside: every word at least once
    concept = probe.watch(base, prompts, seed, report, f"looking at {lesson.concept}", ends=True)
    others = probe.watch(acting, shut, seed + 1000, report, "looking at what stays", edits)
    told = [gate for gate in _text_gates(edits) if _told([gate], acting.encode(prompts)).any()]
    beside = objectives.subset(seed, beside, size.erased)
    heard = _told(told, acting.encode(beside)).tolist() if beside else []
    label, own = "looking at what is erased", prompts[: size.erased]
    gone = probe.watch(acting, own, seed + 2000, report, label, edits, ends=True)
    ends = [_likeness(base, lesson, *one, seed).median() for one in ((prompts, concept), (own, gone))]
    shown = float(ends[1] + SHOWN * (ends[0] - ends[1]))
    if more := [one for one, opens in zip(beside, heard, strict=True) if opens]:
        gone = gone.joined(probe.watch(acting, more, seed + 2500, report, label, edits))
    return _Known(concept, others.joined(gone), len(gone), tuple(told), shown)


def _likeness(base: Base, lesson: Lesson, prompts: Sequence[str], found: Seen, seed: int) -> Tensor:
    """How much more the concept than its anchor pictures are, drawn in place of these prompts': [n]."""
    anchors = {pair.concept: pair.anchor for pair in lesson.pairs}
    asked = base.encode(prompts), base.encode([anchors[prompt] for prompt in prompts])
    return recognition.rather(base, found.ends, *asked, seed)


def _opened(gate: Gate, seen: Seen, told: Tensor) -> Tensor:
    """For which of n pictures, by texts that are `told` of or are not, it opens in half of its looks, [n]."""
    return (torch.maximum(*probe.looks(gate, seen, told))[: len(seen.times) // 2] > 0).any(0)


def _stand_in(base: Base, lesson: Lesson, gate: Gate) -> Edit:
    """The first states of the anchor's plainest prompt, in place of the text, behind the gate."""
    text = lesson.anchors[1] if len(lesson.anchors) > 1 else lesson.anchor
    rows = base.encode([text]).states[0, :ROWS].to("cpu", torch.float16)  # [ROWS, width]
    return Edit(
        "tokens", base.sites(CROSS), {"prompt_k": rows, "prompt_v": rows.clone()}, {"alone": True}, (gate,)
    )


def _search(
    base: Base, acting: Base, lesson: Lesson, prompts: Sequence[str], known: _Known, edits: Sequence[Edit],
    search: Search, size: Budget, number: int, report: Report,
) -> Cond:  # fmt: skip
    """Text states, by the base that acts, of prompts with what was found in them.

    Text gates have a straight-through gradient: where they are shut, the concept is drawn.
    """
    seen, gate = known.concept, known.gate
    carrier, asked = search.carrier(acting, prompts, lesson.names), base.encode(list(prompts))
    generator = torch.Generator().manual_seed(report.seed * 7919 + number)
    begin = known.drew.get(search.free) if search.evade and not search.before else None
    if begin is None:
        begin = _start(base, lesson, len(prompts) if search.before else 1, carrier.free, generator)
    v = nn.Parameter(begin.clone())
    adam = torch.optim.Adam([v], lr=search.lr, foreach=False, fused=False)
    label = f"attacking, round {number + 1} of {size.rounds}"
    for _ in report.count(range(size.steps), size.steps, label):
        rows = torch.randint(len(prompts), (size.batch,), generator=generator)
        steps = torch.randint(len(seen.times), (size.batch,), generator=generator)
        x, t = seen.latents[steps, rows].to(base.device), seen.times[steps].long()
        with torch.no_grad():
            target = base.predict(x, t, asked[rows])  # [batch, c, h, w]
        with torch.enable_grad():
            free = v[rows] if search.before else v.expand(size.batch, -1, -1)  # [batch, free, d]
            cond = carrier.rows(rows).states(split(base, free))
            with gates.straight_through(), attached(base, edits), probe.looking(base) as looks:
                error = (base.predict(x, t, cond) - target).pow(2).mean()
            margin = sight.scores(gate, looks[0], t.float().cpu(), _told(known.told, cond))
            loss = error + search.evade * _shutting(edits, cond, margin - gate.params["threshold"])
            adam.zero_grad()
            torch.autograd.backward(loss, inputs=[v])
        adam.step()
    if not search.evade:
        known.drew[search.free] = v.detach()
    with torch.no_grad():
        return carrier.states(split(base, v.detach().expand(len(prompts), -1, -1)))


def _start(base: Base, lesson: Lesson, n: int, free: int, generator: torch.Generator) -> Tensor:
    """Embeddings of words at random, all encoders' side by side: [n, free, d]."""
    words = common(base, lesson.names).nonzero()[:, 0]
    joined = torch.cat(tables(base), -1)  # [vocabulary, d]
    return joined[words[torch.randint(len(words), (n, free), generator=generator)]]


def _shutting(edits: Sequence[Edit], cond: Cond, looks: Tensor) -> Tensor:
    """How far the gates are from shut, mean over rows: the text's, and the one that looks, [rows]."""
    margins = [*(gates.margins(gate, cond.states) for gate in _text_gates(edits)), looks]
    return sum((margin + SLACK).relu().mean() for margin in margins)


@torch.no_grad()
def _told(told: Sequence[Gate], cond: Cond) -> Tensor:
    """For which of n texts one of these gates is open, if it is a hard one that reads the whole text, [n]."""
    margins = [gates.margins(gate, cond.states) for gate in told if gate.kind == "match"]
    return (torch.stack(margins) > 0).any(0) if margins else torch.zeros(len(cond), dtype=torch.bool)


def _text_gates(edits: Sequence[Edit]) -> list[Gate]:
    """The gates of the edits that read text, each once."""
    return list({g.name: g for edit in edits for g in edit.gates if g.kind in gates.TEXT}.values())
