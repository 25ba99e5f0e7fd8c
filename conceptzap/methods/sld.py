"""SLD: safe latent diffusion, guidance that leads away from the concept at every step.

Schramowski et al. 2023, eq. 3 to 8: eps = u + w (c - u - gamma) with gamma = mu (s - u) + s_m nu, s under
the concept's own text, mu = min(1, s_S |c - s|) where c - s < lambda and 0 elsewhere, nu the momentum
beta nu + (1 - beta) gamma, which builds up before the warm-up ends. Nothing is trained. mu is measured in
noise where the checkpoint predicts v; the momentum is in what it predicts. SLD has no anchor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.runtime import guides
from conceptzap.task import Task

PAPER = "2211.05105"
EDITS = "guide"


@dataclass(frozen=True)
class Config:
    guidance: float = 5000.0  # s_S: weak 20, medium 1000, strong 2000, max 5000
    threshold: float = 1.0  # lambda: 0, 0.01, 0.025, 1
    warmup: float = 0.0  # share of the timesteps that go by first: 0.3, 0.2, 0.14, 0
    momentum: float = 0.5  # s_m: 0, 0.3, 0.5, 0.5
    beta: float = 0.7  # of the momentum: 0, 0.4, 0.7, 0.7


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    for name in ("warmup", "momentum", "beta"):
        if getattr(cfg, name) > 1:
            raise UsageError(f"{name} {getattr(cfg, name)} is out of range", "use 0 to 1")
    numbers = {name: float(getattr(cfg, name)) for name in ("guidance", "threshold", "momentum", "beta")}
    below = max(0, round(len(base.alphas) * (1 - cfg.warmup)) - 1)
    for concept in task.concepts:
        yield guides.guide(base, "safe", [concept, ""], {**numbers, "below": below})
