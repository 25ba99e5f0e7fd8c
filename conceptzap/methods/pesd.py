"""P-ESD: neurons that answer to the concept, and to prompts that attack for it, are masked by training.

Yang et al. 2024, "Pruning for Robust Concept Erasing": erased models fail under attack because neurons
that are sensitive to adversarial prompts stay; a differentiable mask over them is learned with an erasing
loss on the concept's prompts and on attacks. A reconstruction: the paper's body and code are not public,
so masks are hard-concrete gates over the inputs j of feed-forward layers (Louizos et al. 2018),
m_j = clamp(sigma((log u - log(1 - u) + log p_j) / beta)(zeta - gamma) + gamma, 0, 1), u uniform,
min sum || eps_m(x_t, [c, v]) - [eps(x_t, a) - eta (eps(x_t, c) - eps(x_t, a))] ||^2 + sparse mean(1 - m)
with v none or an attack that is searched in turns; in the end m_j < 1/2 is cut. Masks
alone erase little here (the built-in checkpoint's Van Gogh and church are still drawn): expect E below 90.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, objectives
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2405.16534"
EDITS = "weight"
BETA, GAMMA, ZETA = 0.83, -0.1, 1.1


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.ff.net.2"  # layers whose inputs are masked
    eta: float = 0.0  # negative guidance
    start: float = 3.0  # log p of every mask at first: open
    steps: int = 120  # masks and attack together
    attacks: int = 1  # steps of the attack before each of the masks
    batch: int = 6
    lr: float = 0.3  # of log p
    attack_lr: float = 0.02  # learning rate of the attack
    size: int = 4  # soft tokens of the attack
    sparse: float = 0.001  # weight of what is masked
    retain: float = 1.0  # weight of the keep set
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    names = ", ".join(lesson.concept for lesson in taught)
    attack = objectives.prompt(base, names, cfg.size, "inmidout", report.seed, role="attack")
    logits = {
        site: objectives.parameter(torch.full((base.module(site).weight.shape[1],), cfg.start), base)
        for site in base.sites(cfg.sites)
    }
    if not logits:
        raise UsageError(f"no Linear of this base matches {cfg.sites!r}", "for example: unet.*.ff.net.2")

    def terms(step: int, forget: Batch, keep: Batch) -> distil.Terms:
        masks = sample(logits, objectives.step_generator(report.seed + 1, step))
        concept = distil.teacher(base, forget, forget.concept)
        if step % (cfg.attacks + 1) < cfg.attacks:
            with masked(base, {site: mask.detach() for site, mask in masks.items()}):
                yield from distil.student(
                    base, [attack], forget, forget.concept, concept, "attack", group="attack"
                )
            return
        anchor = distil.teacher(base, forget, forget.anchor)
        target = objectives.negative_guidance(concept, anchor, cfg.eta)
        stay = distil.teacher(base, keep, keep.concept)
        yield "sparse", cfg.sparse * torch.cat([1 - mask for mask in masks.values()]).mean(), "masks"
        for name, rows, goal, weight, edits in (
            ("erase", forget, target, 1.0, []),
            ("attacked", forget, target, 1.0, [attack]),
            ("retain", keep, stay, cfg.retain, []),
        ):
            # made anew, for each loss frees its graph
            with masked(base, sample(logits, objectives.step_generator(report.seed + 1, step))):
                yield from distil.student(
                    base, edits, rows, rows.concept, goal, name, weight=weight, group="masks"
                )

    groups = {
        "masks": Group(logits, cfg.lr),
        "attack": Group(objectives.parameters([attack]), cfg.attack_lr),
    }
    sources = [draw(base, taught, cfg, report) for draw in distil.SOURCES]
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    for site, mask in cut({site: one.detach().cpu() for site, one in logits.items()}).items():
        if mask.any():
            yield Edit("weight", (site,), {"keep": ~mask})


def cut(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Site -> which inputs [in] are masked by half or more; the lowest of all, however short the training."""
    masks = {site: gate(one) < 0.5 for site, one in logits.items()}
    lowest = min(logits, key=lambda site: logits[site].min().item())
    masks[lowest][logits[lowest].argmin()] = True
    return masks


def gate(logits: Tensor) -> Tensor:
    """The mask without noise: clamp(sigma(log p)(zeta - gamma) + gamma, 0, 1)."""
    return (logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def sample(logits: dict[str, nn.Parameter], generator: torch.Generator) -> dict[str, Tensor]:
    """Hard-concrete masks [in] of every site."""
    masks = {}
    for site, one in logits.items():
        u = torch.rand(len(one), generator=generator).clamp(1e-6, 1 - 1e-6).to(one)
        s = ((u.log() - (1 - u).log() + one) / BETA).sigmoid()
        masks[site] = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    return masks


@contextmanager
def masked(base: Base, masks: dict[str, Tensor]) -> Iterator[None]:
    """The inputs of every site times its mask, with gradients."""
    handles = [
        base.module(site).register_forward_pre_hook(
            lambda _, args, mask=mask: (args[0] * mask.to(args[0]), *args[1:])
        )
        for site, mask in masks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
