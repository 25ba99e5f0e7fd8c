"""AdvUnlearn: the text encoder forgets the concept, trained against a token that would bring it back.

Zhang et al. 2024, bi-level: one embedding v in front of the prompt is learned to undo the erasure,
min_v || eps_theta(x_t, [v, c]) - eps(x_t, c) ||^2, and the encoder theta to erase in spite of it,
|| eps_theta(x_t, [v, c]) - [eps(x_t, a) - eta (eps(x_t, [v, c]) - eps(x_t, a))] ||^2
+ retain || eps_theta(x_t, k) - eps(x_t, k) ||^2, with kept prompts k for what an encoder must not lose. The
first `warmup` steps are without the attack. Differs: a low-rank change of the encoder's layers instead of
all its weights; one v, which goes on from where it was, moved `attacks` steps before each of theta's (30 from
a new start in the paper); the bare prompt is erased beside the attacked one; x_t from the base's
trajectories; the anchor a for the empty prompt. Its figures: nudity 21.1 % under UnlearnDiffAtk, FID 19.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.task import Task
from conceptzap.training import distil, objectives
from conceptzap.training.carrier import Carrier, tables
from conceptzap.training.lessons import lessons
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2405.15234"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "text.*.layers.*"  # linear layers of the text encoders; all weights in the paper
    rank: int = 4
    eta: float = 0.5  # negative guidance; 1 in the paper
    steps: int = 120  # encoder and attack together; 1000 of the encoder in the paper
    warmup: int = 30  # steps before the first attack; 200 in the paper
    attacks: int = 1  # steps of the attack before each of the encoder's
    batch: int = 6
    lr: float = 0.002
    attack_lr: float = 0.01  # 0.001 in the paper
    retain: float = 4.0  # weight of the keep set; 0.3 in the paper
    trajectories: int = 16


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    taught = list(lessons(base, task, report))
    edits = objectives.low_rank(base, cfg.sites, cfg.rank, report.seed)
    token = prefix(base, report.seed)

    def terms(step: int, forget: Batch, keep: Batch) -> distil.Terms:
        attacked = step >= cfg.warmup
        if attacked and (step - cfg.warmup) % (cfg.attacks + 1) < cfg.attacks:
            back = distil.teacher(base, forget, forget.concept)
            yield from _student(base, edits, forget, back, "attack", token, group="attack")
            return
        anchor = distil.teacher(base, forget, forget.anchor)
        for name, with_it in (("erase", None), ("attacked", token if attacked else None)):
            if name == "erase" or attacked:
                with torch.no_grad():
                    asked = read(base, forget.prompts, with_it)
                seen = distil.teacher(base, forget, asked)
                target = objectives.negative_guidance(seen, anchor, cfg.eta)
                yield from _student(base, edits, forget, target, name, with_it)
        if cfg.retain:
            stays = distil.teacher(base, keep, keep.concept)
            yield from _student(base, edits, keep, stays, "retain", weight=cfg.retain)

    groups = {
        "weights": Group(objectives.parameters(edits), cfg.lr),
        "attack": Group({str(i): one for i, one in enumerate(token)}, cfg.attack_lr),
    }
    sources = [draw(base, taught, cfg, report) for draw in distil.SOURCES]
    report.watch(edits)
    distil.optimise(base, task, cfg, report, groups, sources, terms)
    # SDXL reads neither the last layer nor the pooled text of its first encoder: nothing was learned there
    yield from (edit for edit in edits if edit.tensors["up"].any())


def prefix(base: Base, seed: int) -> list[nn.Parameter]:
    """A free token's embedding [1, d] for each text encoder, with the spread of real ones."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for table in tables(base):
        noise = torch.randn(1, table.shape[1], generator=generator).to(table)
        found.append(objectives.parameter(table.mean(0) + table.std(0) * noise, base))
    return found


def read(base: Base, prompts: Sequence[str], token: Sequence[Tensor] | None) -> Cond:
    """Text states of the prompts, with the token in front of each if there is one; gradients flow."""
    if token is None:
        return base.encode_ids(base.token_ids(prompts))
    carrier = Carrier.before(base, prompts, 1)
    return carrier.states([one.expand(len(prompts), 1, -1) for one in token])


def _student(
    base: Base,
    edits: Sequence[Edit],
    batch: Batch,
    target: Tensor,
    name: str,
    token: Sequence[Tensor] | None = None,
    *,
    weight: float = 1.0,
    group: str = "weights",
) -> distil.Terms:
    """weight * |eps - target|^2 with the prompts read by the encoder as it is trained."""
    with attached(base, edits):
        eps = base.eps(batch.x, batch.t, read(base, batch.prompts, token))
        yield name, weight * objectives.distance(base, eps, target, batch.t, "noise"), group
