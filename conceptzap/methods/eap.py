"""EAP: negative guidance that preserves, in every step, the concept which erasing harms the most.

Bui et al. 2024. Two players alternate on the base's latents:
weights: min || eps_theta(x, c) - [eps(x, a) - eta (eps(x, c) - eps(x, a))] ||^2
             + retain || eps_theta(x_r, c_r) - eps(x_r, c_r) ||^2
choice:  max || eps_theta(x_r, c_r) - eps(x_r, c_r) ||^2 over the logits pi of
         c_r = sum_k GumbelSoftmax(pi)_k E(prompt_k), hard with straight-through gradients.
Differs: the change is low-rank; the candidates are prompts of the keep set (the nearest words of the
vocabulary in several wordings, spread evenly) instead of k-means centres of the nearest words; x_r is the
base's own latent of the chosen candidate; as in the released code the base's noise for c_r passes no
gradient to the choice. The released code takes both losses in x0 space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, objectives
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch, Trajectories
from conceptzap.training.train import Group

PAPER = "2410.15618"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_*"
    rank: int = 4
    eta: float = 0.3  # negative guidance; 1 in the paper
    steps: int = 120  # of both players together
    searches: int = 1  # steps of the choice before each of the weights; 2 in the paper
    batch: int = 6
    lr: float = 0.003
    choice_lr: float = 0.1  # of the logits; .01 in the paper
    temperature: float = 2.0  # of the Gumbel softmax
    candidates: int = 24  # prompts to choose from; 100 in the paper
    retain: float = 4.0  # weight of the chosen concept; 1 in the paper
    space: str = "noise"  # or x0, the form of the released code
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    rivals = Rivals.of(base, [p for lesson in taught for p in lesson.keep], cfg, report)

    def terms(step: int, forget: Batch, rival: Batch) -> distil.Terms:
        own = distil.teacher(base, rival, rival.concept)
        if step % (cfg.searches + 1) < cfg.searches:
            yield from distil.student(
                base, edits, rival, rival.concept, own, "search",
                weight=-1.0, group="choice", space=cfg.space,
            )  # fmt: skip
            return
        concept, anchor = (distil.teacher(base, forget, c) for c in (forget.concept, forget.anchor))
        target = objectives.negative_guidance(concept, anchor, cfg.eta)
        yield from distil.student(
            base, edits, forget, forget.concept, target, "erase", space=cfg.space
        )
        yield from distil.student(
            base, edits, rival, rival.concept, own, "retain", weight=cfg.retain, space=cfg.space
        )

    groups = {
        "weights": Group(objectives.parameters(edits), cfg.lr),
        "choice": Group({"logits": rivals.logits}, cfg.choice_lr),
    }
    sources = [distil.concept_latents(base, taught, cfg, report), rivals]
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    yield from edits


@dataclass(frozen=True)
class Rivals:
    """Prompts that may be harmed, one trajectory each, drawn by logits [k] that gradients reach."""

    drawn: Trajectories
    logits: nn.Parameter
    temperature: float

    @staticmethod
    def of(base: Base, prompts: list[str], cfg: Config, report: Report) -> Rivals:
        stride = max(1, len(prompts) // max(1, cfg.candidates))
        chosen = prompts[::stride][: max(1, cfg.candidates)]
        drawn = Trajectories.kept(base, chosen, len(chosen), report)
        return Rivals(drawn, objectives.parameter(torch.zeros(len(chosen)), base), cfg.temperature)

    def draw(self, generator: torch.Generator, batch: int, part: int, parts: int) -> Batch:
        steps, n = self.drawn.latents.shape[:2]
        when = torch.randint(steps, (batch,), generator=generator)
        uniform = torch.rand(batch, n, generator=generator).clamp(1e-6, 1 - 1e-6)
        rows = slice(batch * part // parts, batch * (part + 1) // parts)
        when, gumbel = when[rows], -(-uniform[rows].log()).log()
        choice = straight_through(self.logits, gumbel.to(self.logits), self.temperature)  # [rows, n]
        which = choice.argmax(1).cpu()
        x = self.drawn.latents[when, which].to(self.drawn.device)  # [rows, c, h, w]
        mixed = distil.mixed(self.drawn.concept, choice)
        return Batch(x, self.drawn.times[when], mixed, mixed, len(when) / batch)


def straight_through(logits: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """One-hot draws [rows, k] with the gradient of softmax((pi + gumbel) / temperature)."""
    soft = ((logits + gumbel) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + soft - soft.detach()
