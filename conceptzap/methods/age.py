"""AGE: the concept becomes what it is best replaced by, a learned mixture of its neighbours.

Bui et al. 2025. Two players alternate, c_t = sum_k softmax(pi / tau)_k E(prompt with word k):
weights: min || eps_theta(x, c) - [eps(x, c_t) - eta (eps(x, c) - eps(x, c_t))] ||^2
             + retain || eps_theta(x_t, c_t) - eps(x_t, c_t) ||^2
choice:  max || eps_theta(x_t, c_t) - eps(x_t, c_t) ||^2 over pi, the target that erasing harms the most.
As in the released code the first term passes no gradient to the choice (in the paper it does). The words
are the concept's nearest in the base's vocabulary that are no synonyms, in the concept's own prompts; the
task's anchor is one of them. Differs: the change is low-rank, the latents are the base's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, neighbours, objectives
from conceptzap.training.lessons import Lesson, known_names, lessons
from conceptzap.training.objectives import Batch, Trajectories
from conceptzap.training.train import Group

PAPER = "2501.18950"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_*"
    rank: int = 4
    eta: float = 0.0  # negative guidance; 1 in the paper
    steps: int = 120  # of both players together
    searches: int = 1  # steps of the choice before each of the weights
    batch: int = 6
    lr: float = 0.003
    choice_lr: float = 0.1  # of the logits
    temperature: float = 0.5  # tau; 2 for artists, .1 for objects in the paper
    candidates: int = 8  # words to choose from; 100 in the paper
    retain: float = 1.0  # weight of the target concept and of the keep set
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    choices = [Choice.of(base, lesson, cfg, report) for lesson in taught]

    def terms(step: int, keep: Batch, *drawn: Batch) -> distil.Terms:
        turn, player = divmod(step, cfg.searches + 1)
        forget, goal = drawn[2 * (turn % len(taught)) :][:2]  # one concept a turn
        own = distil.teacher(base, goal, goal.anchor)
        if player < cfg.searches:
            yield from distil.student(
                base, edits, goal, goal.anchor, own, "search", weight=-1.0, group="choice"
            )
            return
        concept, anchor = (distil.teacher(base, forget, c) for c in (forget.concept, forget.anchor))
        target = objectives.negative_guidance(concept, anchor, cfg.eta)
        yield from distil.student(base, edits, forget, forget.concept, target, "erase")
        yield from distil.student(base, edits, goal, goal.anchor, own, "target", weight=cfg.retain)
        yield from distil.retain(base, edits, keep, cfg)

    groups = {
        "weights": Group(objectives.parameters(edits), cfg.lr),
        "choice": Group({str(i): one.logits for i, one in enumerate(choices)}, cfg.choice_lr),
    }
    sources = [distil.kept_latents(base, taught, cfg, report)]
    sources += [source for choice in choices for source in (choice, replace(choice, of_goal=True))]
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    yield from edits


@dataclass(frozen=True)
class Choice:
    """Prompts in m wordings, each with k words in the concept's place: `cond` [m * k], word by word.

    `asked` has the concept's trajectories, `goals` one a word; `of_goal` draws from the latter.
    """

    asked: Trajectories
    goals: Trajectories
    cond: Cond
    logits: nn.Parameter
    temperature: float
    of_goal: bool = False

    @staticmethod
    def of(base: Base, lesson: Lesson, cfg: Config, report: Report) -> Choice:
        pairs = [pair for pair in lesson.pairs if lesson.concept in pair.concept]
        chosen = objectives.subset(report.seed, pairs, cfg.trajectories)
        names = words(base, lesson, cfg.candidates)
        grid = [
            prompt
            for pair in chosen
            for prompt in (pair.anchor, *(pair.concept.replace(lesson.concept, n) for n in names))
        ]
        k = len(names) + 1
        # word i is looked at in wording i
        goals = [grid[(i % len(chosen)) * k + i] for i in range(k)]
        logits = objectives.parameter(torch.zeros(k), base)
        return Choice(
            _latents(base, [pair.concept for pair in chosen], report, 0),
            _latents(base, goals, report, 2),
            base.encode(grid),
            logits,
            cfg.temperature,
        )

    def draw(self, generator: torch.Generator, batch: int, part: int, parts: int) -> Batch:
        steps, n = self.asked.latents.shape[:2]
        k = len(self.logits)
        weights = (self.logits / self.temperature).softmax(0)
        when = torch.randint(steps, (batch,), generator=generator)
        which = torch.randint(n, (batch,), generator=generator)
        goal = torch.multinomial(weights.detach().cpu(), batch, True, generator=generator)
        rows = slice(batch * part // parts, batch * (part + 1) // parts)
        when, which, goal = when[rows], which[rows], goal[rows]
        source, index = (self.goals, goal) if self.of_goal else (self.asked, which)
        wording = goal % n if self.of_goal else which  # [rows]
        spots = wording[:, None] * k + torch.arange(k)  # [rows, k]
        spread = torch.zeros(len(spots), len(self.cond)).to(weights)
        spread = spread.scatter(1, spots.to(weights.device), weights.expand(len(spots), -1))
        mixed = distil.mixed(self.cond, spread)
        x = source.latents[when, index].to(source.device)  # [rows, c, h, w]
        share = len(index) / batch
        return Batch(x, source.times[when], source.concept[index.tolist()], mixed, share)


def words(base: Base, lesson: Lesson, n: int) -> list[str]:
    """The concept's n nearest of its kind that the base knows and that are no synonyms."""
    gone = {lesson.concept.lower(), lesson.anchor.lower(), *map(str.lower, lesson.synonyms)}
    known = [name for name in known_names(base, lesson.kind) if name.lower() not in gone]
    near = neighbours.neighbours(base, lesson.concept, known)
    return [name for name, _ in near if name in known][:n]


def _latents(base: Base, prompts: list[str], report: Report, turn: int) -> Trajectories:
    """One trajectory a prompt, in the prompts' own order."""
    latents, times = objectives.partial_sampling(base, prompts, report.seed + turn, report)
    cond = base.encode(prompts)
    return Trajectories(latents, times, cond, cond, base.device)
