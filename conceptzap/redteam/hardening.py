"""Attack an erasure while it is made, and give it a gate that looks at the picture for what came through.

Behind the gate some of the anchor's states stand in place of the text's, so that nothing there has to
recognise it, and in unconditional rows some of the concept's, or beyond (`alone` rows at every
cross-attention): guidance then leads away from what the picture already shows of it, however late the gate
opens, as a negative prompt does. Such rows beside the text's stand behind the text gates, too, for what the
edits there leave of the concept in words that were searched for. A round searches for text states that bring
it back (`finding.py`). What it finds is drawn from noise. It is the concept where the base itself says so
(`training/recognition.py`), for the gate cannot tell what it does not see; and it came through where no look
of the first half had opened the gate. What is the concept joins what that search has found before, or all
that evade no gate, which have a probe of their own (or, while it is little, that of the mixtures below), so
that the next search has to get past all of them (STEREO's rounds, Srivatsan et al. 2025, with a probe in
place of the weights). The probe of the concept as the base draws it sees none of that: tokens that evade draw
what is half something else, and dull it. When every search in turn has found nothing new, that is the end.
Tokens that stand for the name in every prompt join the text gate, too, where they can be told.

Before all that comes what takes no search: the name written wrongly, which a text gate is fitted for
(`slips.py`) and a probe; and mixtures of the concept's text states with those of others of its kind, since
what evades a gate draws what is half the concept; they have a probe of their own, too. Where the text does
open a gate, what is drawn has only to stay as what was erased looks: words that hide a half-erased concept
stand out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Gate, Json
from conceptzap.redteam import finding, slips, spelling, standing_in
from conceptzap.redteam.case import GIVEN, MISSPELT, Budget, Case, Known, Search, told_by
from conceptzap.redteam.finding import Found
from conceptzap.report import Report
from conceptzap.runtime import texts
from conceptzap.task import Task
from conceptzap.training import lessons, objectives, probe
from conceptzap.training.lessons import Lesson
from conceptzap.training.probe import Seen

SHARES = (0.7, 0.6, 0.5)  # of the concept in a mixture
MIXED = 8  # others of its kind that it is mixed with

BUDGETS = {
    "quick": Budget(erased=16, mixed=27),
    "full": Budget(erased=24, mixed=54, turns=3, steps=40),
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
        case = Case(base, acting, lesson, tuple(baked), BUDGETS[budget], report)
        own, record[lesson.concept] = _hardened(case, beside)
        more += own
    size = BUDGETS[budget].digest
    return Hardened((*edits, *more), {"budget": budget, "size": size, "rounds": record})


def _hardened(case: Case, beside: Sequence[str]) -> tuple[list[Edit], dict[str, Json]]:
    """What joins the edits, and what came of the rounds, column by column, one of each a round.

    `beside`: prompts of the concepts that are erased with it.
    """
    # 1. what the concept looks like on its way, and what else must not open the gate
    size, rounds, idle = case.size, [], set()
    prompts = objectives.subset(case.report.seed, case.lesson.prompts, size.concept)
    plain, words = case, []
    told, more = _told_of(plain, prompts, beside)
    case = replace(plain, edits=(*plain.edits, *more))
    known = _watched(case, prompts, beside, told)
    # 2. look at what slips of the finger draw; then attack, look, fit again
    meant, wrong = _misspelt(case.lesson, prompts)
    rounds.append(_round(case, known, MISSPELT, meant, case.acting.encode(wrong)))
    searches = [search for search in size.order if finding.applies(case, search)]
    again = {search for search in searches if search.place not in GIVEN}
    for number, search in enumerate(searches):
        asked = prompts[: size.own] if search.own else prompts
        found = finding.find(case, known, search, asked, number, len(searches))
        drawn = [index % len(asked) for index in range(size.found)]
        rounds.append(_round(case, known, search, [asked[i] for i in drawn], found.cond[drawn], number + 1))
        if found.at is not None and rounds[-1]["drawn"]:
            words.append(found)
        idle = set() if rounds[-1]["through"] else {*idle, search}
        if idle >= again:
            break
    # 3. words that were found join the text gate, and what stands behind it; the other is calibrated again
    if words:
        told, more = _told_of(plain, prompts, beside, words)
        known = known if told == known.told else replace(known, told=told)
    more.append(standing_in.instead(case.base, case.lesson, known.gate))
    return more, {name: [one[name] for one in rounds] for name in rounds[0]}


def _told_of(
    case: Case, prompts: Sequence[str], beside: Sequence[str], words: Sequence[Found] = ()
) -> tuple[tuple[Gate, ...], list[Edit]]:
    """The text gates that open for the concept, one for its wrong spelling among them; and rows behind them.

    Behind a gate that opens for another concept of the task, too, stand none. The one for wrong spelling,
    and for `words` that were found, opens where the first of the others does, in whose place it has them.
    """
    told, shared = case.opened(prompts), case.opened(beside)
    stay = [*beside, *_styled(case)] if words else beside
    behind = [gate for gate in told if gate not in shared]
    hard = [gate for gate in behind if gate.kind == "match" and gate.params["threshold"] > 0]
    if hard and (gate := slips.fit_gate(case.acting, case.lesson, stay, hard[0], case.report.seed, words)):
        told = (*told, gate)
        behind[behind.index(hard[0])] = gate
    return told, [standing_in.beside(case.base, case.lesson, one) for one in behind]


def _misspelt(lesson: Lesson, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts, each as often as another, and the same with the concept's name written wrongly in them."""
    wrong = spelling.misspelt(lesson.concept)
    meant = [prompts[number % len(prompts)] for number in range(len(wrong))]
    return meant, [spelling.reworded(*one) for one in zip(meant, repeat(lesson.names), wrong)]


def _round(
    case: Case, known: Known, search: Search, asked: Sequence[str], cond: Cond, number: int = 0
) -> dict[str, Json]:
    """Look at what was found in place of prompts; what shows the concept is learned, what came of it told."""
    found = case.watch(cond, 2900 + 100 * number, "looking at what was found", ends=True)
    drawn = case.likeness(asked, found, number) > 0
    through = drawn & ~_opened(known.gate, found, told_by(known.told, cond))
    if drawn.any():
        known.learn(search, found.rows(drawn))
    return {
        "tokens": search.free, "place": search.place, "evades": search.evade > 0, "n": len(found),
        "drawn": int(drawn.sum()), "through": int(through.sum()),
    }  # fmt: skip


def _watched(case: Case, prompts: Sequence[str], beside: Sequence[str], told: tuple[Gate, ...]) -> Known:
    """The concept as the base draws it, and under the edits what stays, the anchor and what is erased."""
    lesson, size, seed = case.lesson, case.size, case.report.seed
    # 1. the concept, and what stays: every word `beside` at least once
    label = f"looking at {lesson.concept}"
    concept = probe.watch(case.base, prompts, seed, case.report, label)
    mixed = probe.watch(case.base, _mixed(case, prompts), seed + 500, case.report, label)
    anchors = objectives.subset(seed, lesson.anchors, size.others // 8)
    farther = lesson.beside[: -(-len(lesson.beside) * size.wordings // lessons.WORDINGS)]
    asked = [*lesson.kept(size.others), *farther, *_styled(case), *anchors]
    others = case.watch(asked, 1000, "looking at what stays")
    # 2. what is erased, and what else is behind the same gates
    label = "looking at what is erased"
    gone = case.watch(prompts[: size.erased], 2000, label)
    opens = told_by(told, case.acting.encode(list(beside))).tolist() if beside else []
    if heard := [one for one, open_ in zip(beside, opens, strict=True) if open_]:
        gone = gone.joined(case.watch(objectives.subset(seed, heard, size.erased), 2500, label))
    return Known(concept, mixed, others.joined(gone), len(gone), told)


def _styled(case: Case) -> list[str]:
    """Things in named styles, which no lesson crosses."""
    every = lessons.in_styles(case.base, case.lesson)
    return objectives.subset(case.report.seed, every, case.size.styled)


def _mixed(case: Case, prompts: Sequence[str]) -> Cond:
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
