"""SPM: one-dimensional adapters in every layer of the transformers, let through as a prompt comes near.

Lyu et al. 2024: a rank-one change of every Linear and convolution, learned from
|| eps_theta(x, c) - [eps(x, a) - eta (eps(x, c) - eps(x, a))] ||^2
and held everywhere else by latent anchoring, k || eps_theta(x, r) - eps(x, r) ||^2 on random texts r with the
mean and spread of real states. Facilitated transport: at inference each concept's change is multiplied by how
near the prompt comes to it. Differs: nearness is read from the text states alone (`similar`: nothing for
what stays, all for the concept, a ramp between), where the paper takes the larger of the states' cosine and
the share of common tokens; it multiplies the change once, not both of its factors; files add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, lessons, objectives
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2312.16145"
EDITS = "weight, gated"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attentions.*"  # every Linear and convolution in there
    rank: int = 1
    eta: float = 1.0  # negative guidance
    steps: int = 120  # 3000 in the paper
    batch: int = 6  # 1 in the paper
    lr: float = 0.01
    anchoring: float = 10.0  # weight of what random texts must stay; 1000 in the paper
    retain: float = 1.0  # weight of the keep set; 0 in the paper
    trajectories: int = 16
    power: float = 1.0  # of nearness, by which the change is multiplied
    keep_prompts: int = 400  # prompts that the gate stays shut for
    directions: int = 2  # of the gate's detector


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    for lesson in lessons.lessons(base, task, report):
        edits = membranes(base, cfg.sites, cfg.rank, report.seed)
        told = base.encode(lesson.kept(cfg.keep_prompts))

        def terms(step: int, forget: Batch, keep: Batch, edits=edits, told=told) -> distil.Terms:
            concept, anchor = (distil.teacher(base, forget, c) for c in (forget.concept, forget.anchor))
            target = objectives.negative_guidance(concept, anchor, cfg.eta)
            yield from distil.student(base, edits, forget, forget.concept, target, "erase")
            if cfg.anchoring:
                strange = random_texts(told, len(forget.x), report.seed + step)
                stays = distil.teacher(base, forget, strange)
                weight = {"weight": cfg.anchoring}
                yield from distil.student(base, edits, forget, strange, stays, "anchor", **weight)
            yield from distil.retain(base, edits, keep, cfg)

        groups = {"weights": Group(objectives.parameters(edits), cfg.lr)}
        sources = [draw(base, [lesson], cfg, report) for draw in distil.SOURCES]
        report.watch(edits)
        distil.optimise(base, task, cfg, report, groups, sources, terms, lesson.concept)
        near = lessons.near(
            base, [lesson], report.seed, cfg.keep_prompts, cfg.directions, cfg.power, report
        )
        yield from (replace(edit, gates=(near,)) for edit in edits)


def membranes(base: Base, pattern: str, rank: int, seed: int) -> list[Edit]:
    """A trainable pair at every Linear and convolution, `up` starting at zero: no change yet."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for site in base.sites(pattern):
        weight = getattr(base.module(site), "weight", None)
        if weight is None or weight.ndim not in (2, 4):
            continue
        out, *into = weight.shape
        down = torch.randn(rank, *into, generator=generator) / weight[0].numel() ** 0.5
        slots = {"up": torch.zeros(out, rank, *(1 for _ in into[1:])), "down": down}
        tensors = {slot: objectives.parameter(tensor, base) for slot, tensor in slots.items()}
        edits.append(Edit("weight", (site,), tensors))
    if not edits:
        raise UsageError(f"no layer of this base matches {pattern!r}", "for example: unet.*.attentions.*")
    return edits


def random_texts(told: Cond, n: int, seed: int) -> Cond:
    """n texts that say nothing, each feature with the mean and spread it has in those told."""
    generator = torch.Generator().manual_seed(seed)

    def strange(field: Tensor | None) -> Tensor | None:
        if field is None:
            return None
        noise = torch.randn(n, *field.shape[1:], generator=generator).to(field)
        return field.mean(0) + field.std((0, 1) if field.ndim == 3 else 0) * noise

    ids = None if told.time_ids is None else told.time_ids[:1].expand(n, -1)
    return Cond(strange(told.states), strange(told.pooled), ids)
