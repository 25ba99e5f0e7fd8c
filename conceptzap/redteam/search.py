"""The search of every gradient attack: AdamW in rounds, each of them kept, so that it can be taken up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.base import Cond
from conceptzap.edit import Json
from conceptzap.errors import ResourceError
from conceptzap.redteam.victim import Tensors, Victim
from conceptzap.report import Report

Loss = Callable[[Mapping[str, nn.Parameter], torch.Generator, int], Tensor]
SLOTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Pace:
    """`rounds` of `steps` steps of AdamW each; after every round what was found is tried."""

    rounds: int
    steps: int
    lr: float
    decay: float = 0.0

    @staticmethod
    def of(cfg: Any) -> Pace:
        return Pace(cfg.rounds, cfg.steps, cfg.lr, cfg.decay)


def search(
    victim: Victim,
    form: str,
    about: Json,
    start: Tensors,
    loss: Loss,
    pace: Pace,
    report: Report,
    after: Callable[[Mapping[str, nn.Parameter]], None] | None = None,
) -> Iterator[Tensors]:
    """Lower `loss(variables, generator, step)` and yield the variables after every round.

    `about`: what the search depends on beside the victim and the form. `after` mends the variables in
    place after each step. All randomness has to be the generator's, which is of the step's own.
    """
    variables = {name: nn.Parameter(tensor.detach().clone().float()) for name, tensor in start.items()}
    adam = torch.optim.AdamW(
        list(variables.values()), lr=pace.lr, weight_decay=pace.decay, foreach=False, fused=False
    )

    def advance(number: int) -> Tensors:
        steps = range(number * pace.steps, (number + 1) * pace.steps)
        label = f"searching, round {number + 1} of {pace.rounds}"
        for step in report.count(steps, len(steps), label):
            adam.zero_grad(set_to_none=True)
            value = loss(variables, victim.generator(step), step)
            if not value.isfinite():
                raise ResourceError(f"the attack's loss is {value.item()}", "lower lr")
            torch.autograd.backward(value, inputs=list(variables.values()))
            adam.step()
            with torch.no_grad():
                if after:
                    after(variables)
        return _state(variables, adam)

    for number in range(pace.rounds):
        key = ["search", form, about, [pace.rounds, pace.steps, pace.lr, pace.decay], number]
        state = victim.once(key, lambda number=number: advance(number), form)
        _restore(variables, adam, state, (number + 1) * pace.steps)
        yield {name: variable.detach().clone() for name, variable in variables.items()}


def _state(variables: Mapping[str, nn.Parameter], adam: torch.optim.AdamW) -> Tensors:
    values = {f"{name}/value": variable for name, variable in variables.items()}
    moments = {
        f"{name}/{slot}": adam.state[variable][slot]
        for name, variable in variables.items() for slot in SLOTS if variable in adam.state
    }  # fmt: skip
    return values | moments


def _restore(
    variables: Mapping[str, nn.Parameter], adam: torch.optim.AdamW, state: Tensors, steps: int
) -> None:
    for name, variable in variables.items():
        variable.data.copy_(state[f"{name}/value"])
        if f"{name}/{SLOTS[0]}" in state:
            moments = {slot: state[f"{name}/{slot}"] for slot in SLOTS}
            adam.state[variable] = {"step": torch.tensor(float(steps)), **moments}


def times(victim: Victim, n: int, generator: torch.Generator, low: int = 0, high: int = 1000) -> Tensor:
    """n timesteps, uniform in low..high (of 1000)."""
    total = len(victim.base.alphas)
    return torch.randint(low * total // 1000, max(1, high * total // 1000), (n,), generator=generator)


def noise_error(
    victim: Victim,
    form: str,
    cond: Cond,
    clean: Tensor,
    generator: torch.Generator,
    t: Tensor,
    wanted: Cond | None = None,
) -> Tensor:
    """|| noise - eps(x_t, t, cond) ||^2, the mean over each row: [n].

    With `wanted`, texts that call for the clean pictures, the noise is the one that who knows the
    concept sees for them: its mean given x_t, so that one sample says as much as many.
    """
    x, noise = victim.noised(clean, t, generator)
    if wanted is not None:
        with torch.no_grad():
            noise = victim.knows.eps(x, t, wanted)
    return (victim.eps(form, x, t, cond) - noise).pow(2).flatten(1).mean(1)
