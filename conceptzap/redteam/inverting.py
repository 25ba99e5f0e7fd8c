"""DDIM run backwards: from a picture to the noise that draws it (Song et al. 2021, eq. 14)."""

from __future__ import annotations

import torch
from torch import Tensor

from conceptzap.base import Cond
from conceptzap.redteam.victim import TRANSFER, Victim

FIXED_POINT = 3  # passes that mend each inverted step (TINA+; Pan et al. 2023)


@torch.no_grad()
def inverted(victim: Victim, form: str, clean: Tensor, cond: Cond) -> list[Tensor]:
    """Latents [n, c, h, w] before every step, first to last, of a walk that ends in the clean ones.

    On what `form` searches on, without guidance. Each step x_i of the walk to x_{i+1} is the fixed
    point of x = sqrt(a_i) x0(x) + sqrt(1 - a_i) eps(x, t_i).
    """
    times, alphas = schedule(victim)
    trail = [clean]
    for index in reversed(range(len(times))):
        after = trail[0]  # what this step has to come to
        x = after
        for _ in range(FIXED_POINT):
            t = torch.full((len(x),), times[index], device=x.device)
            eps = victim.eps(form, x, t, cond, guided=False)
            x0 = (after - (1 - alphas[index + 1]).sqrt() * eps) / alphas[index + 1].sqrt()
            x = alphas[index].sqrt() * x0 + (1 - alphas[index]).sqrt() * eps
        trail.insert(0, x)
    return trail


def schedule(victim: Victim) -> tuple[list[int], Tensor]:
    """The sampler's timesteps, and alpha-bar at each of them and behind the last, [steps + 1]."""
    scheduler = victim.base.scheduler("ddim")
    scheduler.set_timesteps(victim.settings.steps)
    times = [int(t) for t in scheduler.timesteps]
    alphas = victim.base.alphas
    last = torch.as_tensor(scheduler.final_alpha_cumprod).to(alphas)
    stride = len(alphas) // victim.settings.steps
    behind = [alphas[t - stride] if t >= stride else last for t in times]
    return times, torch.stack([alphas[times[0]], *behind])


def step(eps: Tensor, x: Tensor, alpha: Tensor, after: Tensor) -> Tensor:
    """One DDIM step from alpha-bar `alpha` to `after`."""
    x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    return after.sqrt() * x0 + (1 - after).sqrt() * eps


def start(victim: Victim, form: str, clean: Tensor, cond: Cond) -> Tensor:
    """The noise [n, c, h, w] from which the clean latents are drawn; kept."""
    about = ["inverted", form, FIXED_POINT]
    return victim.once(about, lambda: {"noise": inverted(victim, form, clean, cond)[0]}, form)["noise"]


FORMS = (TRANSFER, "straight-through")
