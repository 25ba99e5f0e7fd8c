"""Receler: small erasers behind every cross-attention, trained against an adversarial prompt, where it is.

Huang et al. 2024: after each attn2 output y an eraser y + up gelu(down y). Two players alternate:
attack: min || eps_theta(x, [c, p]) - eps(x, c) ||^2 over soft tokens p behind the prompt;
eraser: min || eps_theta(x, [c, p]) - [eps(x, a) - eta (eps(x, c) - eps(x, a))] ||^2
            + local sum_l || (1 - M) up gelu(down y_l) ||^2,
M the region that the base's attention gives to the concept's words. Differs: the attack is a pair of K
and V prompts that goes on from step to step instead of one prompt searched anew in each, the erasers are
narrow (`rank`; 128 in the paper), the latents are the base's own, and a keep set may hold what stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import attending, distil, objectives
from conceptzap.training.attending import Marked, MarkedLatents
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2311.17717"
EDITS = "adapter"
OUTPUT = "unet.*.attn2.to_out.0"


@dataclass(frozen=True)
class Config:
    rank: int = 8  # width of an eraser; 128 in the paper
    eta: float = 0.3  # negative guidance; 1 in the paper
    steps: int = 120  # of both players together
    attacks: int = 1  # steps of the attack before each of the erasers; 50 in the paper
    batch: int = 6
    lr: float = 0.003
    attack_lr: float = 0.02  # learning rate of the attack
    size: int = 4  # soft tokens of the attack; 16 in the paper
    local: float = 0.1  # weight of what erasers do outside the concept's region
    region: float = 0.1  # attention, of its largest, that counts as the region
    retain: float = 3.0  # weight of the keep set; 0 in the paper
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    edits = erasers(base, cfg.rank, report.seed)
    names = ", ".join(lesson.concept for lesson in taught)
    attack = objectives.prompt(base, names, cfg.size, "inmidout", report.seed, role="attack")

    def terms(step: int, forget: Marked, keep: Batch) -> distil.Terms:
        concept = distil.teacher(base, forget, forget.concept)
        if step % (cfg.attacks + 1) < cfg.attacks:
            yield from distil.student(
                base, [*edits, attack], forget, forget.concept, concept, "attack", group="attack"
            )
            return
        anchor = distil.teacher(base, forget, forget.anchor)
        target = objectives.negative_guidance(concept, anchor, cfg.eta)
        inside = attending.region(base, forget, forget.concept, cfg.region)
        with watched(base) as outputs, attached(base, [*edits, attack]):
            eps = base.eps(forget.x, forget.t, forget.concept)
            loss = objectives.distance(base, eps, target, forget.t, "noise")
            outside = strays(edits, outputs, inside)
            yield "erase", loss + cfg.local * outside, "erasers"
        for name, loss, _ in distil.retain(base, edits, keep, cfg):
            yield name, loss, "erasers"

    groups = {
        "erasers": Group(objectives.parameters(edits), cfg.lr),
        "attack": Group(objectives.parameters([attack]), cfg.attack_lr),
    }
    forget = MarkedLatents.of(base, taught, cfg.trajectories, report)
    sources = [forget, distil.kept_latents(base, taught, cfg, report)]
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    yield from edits


def erasers(base: Base, rank: int, seed: int) -> list[Edit]:
    """One bottleneck for each cross-attention's output; `up` starts at zero: no change yet."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for site in base.sites(OUTPUT):
        out = len(base.module(site).weight)
        down = torch.randn(rank, out, generator=generator) / out**0.5
        slots = {"up": torch.zeros(out, rank), "down": down}
        tensors = {slot: objectives.parameter(tensor, base) for slot, tensor in slots.items()}
        edits.append(Edit("adapter", (site,), tensors, {"phi": "gelu", "reads": "y"}))
    return edits


@contextmanager
def watched(base: Base) -> Iterator[dict[str, Tensor]]:
    """Outputs y [rows, pixels, d] of every site as they are before an eraser, once the UNet has run."""
    outputs: dict[str, Tensor] = {}

    def hook(site: str):
        return lambda module, args, output: outputs.__setitem__(site, output)

    # hooks run in the order they came: these see what those of `attached` then change
    handles = [base.module(site).register_forward_hook(hook(site)) for site in base.sites(OUTPUT)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def strays(edits: list[Edit], outputs: dict[str, Tensor], inside: Tensor) -> Tensor:
    """Mean square of what erasers add outside the region [rows, 1, side, side], mean over layers."""
    total = []
    for edit in edits:
        (site,) = edit.sites
        y = outputs[site]
        up, down = (edit.tensors[slot].to(y.device, y.dtype) for slot in ("up", "down"))
        added = F.linear(F.gelu(F.linear(y, down)), up)  # [rows, pixels, d]
        outside = 1 - attending.at_pixels(inside, y.shape[1]).to(added)
        total.append((outside[..., None] * added).pow(2).mean())
    return torch.stack(total).mean()
