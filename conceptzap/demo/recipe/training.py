"""The one training loop of the recipe: cosine schedule, EMA, checkpoints, a log of the loss.

Every random choice of a step is seeded by the step's number, so a resumed run needs no generator
state to go on as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CHECKPOINT_SECONDS = 180
_KEPT = 2
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training run is: fixed in advance, so that the schedule is known."""

    name: str
    steps: int
    lr: float
    seed: int
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.998
    warmup: int = 100

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to a hundredth."""
        ramp = min(1.0, (step + 1) / self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * ramp * (0.01 + 0.99 * cosine)


Loss = Callable[[int], dict[str, Tensor]]


def fit(model: nn.Module, loss: Loss, recipe: Recipe, folder: Path) -> nn.Module:
    """Train `model` and return it with its averaged weights.

    `loss(step)` returns named terms; "total" is what is minimised. `folder` holds the checkpoints
    and `loss.jsonl`; a run found there is taken up, a finished one is only loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, recipe, folder)
    run.resume()
    model.train()
    while run.step < recipe.steps:
        torch.manual_seed(recipe.seed * 1_000_003 + run.step)
        run.advance(loss(run.step))
    run.save()
    run.use_average()
    return model.eval()


class _Run:
    def __init__(self, model: nn.Module, recipe: Recipe, folder: Path) -> None:
        self.model, self.recipe, self.folder = model, recipe, folder
        self.step = 0
        self.parameters = dict(model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.lr, betas=recipe.betas,
            weight_decay=recipe.weight_decay, fused=True)
        self.live = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
        self.average = {k: v.detach().clone() for k, v in self.live.items()}
        self._saved = self._logged = time.monotonic()
        self._terms: dict[str, float] = {}

    def advance(self, terms: dict[str, Tensor]) -> None:
        """One optimiser step on `terms["total"]`."""
        if not torch.isfinite(terms["total"]):
            raise FloatingPointError(f"{self.recipe.name}: the loss is not finite at step "
                                     f"{self.step}; the last checkpoint is kept")
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        # A young average forgets faster, or it would remember the random start.
        keep = min(self.recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self.live.values()), 1 - keep)
        self._log(terms)
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save()

    def _log(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + float(value.detach()) / 50
        if self.step % 50:
            return
        now = time.monotonic()
        row = {"step": self.step, "lr": round(self.recipe.rate(self.step), 7),
               "seconds_per_step": round((now - self._logged) / 50, 4)}
        row |= {name: round(value, 5) for name, value in self._terms.items()}
        with (self.folder / "loss.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        self._terms, self._logged = {}, now

    def save(self) -> None:
        """Write a checkpoint whole or not at all; the two newest stay."""
        tensors = {f"model.{k}": v.detach() for k, v in self.live.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        target = self.folder / f"step-{self.step:07d}.safetensors"
        partial = target.with_suffix(".part")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
        for old in checkpoints(self.folder)[:-_KEPT]:
            old.unlink()
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Take up the newest readable checkpoint, if there is one."""
        for path in reversed(checkpoints(self.folder)):
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError):
                continue  # a damaged file must not cost the older, whole one
            self._restore(tensors)
            self.step = int(path.stem.split("-")[1])
            return

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, value in self.live.items():
                value.copy_(tensors[f"model.{key}"])
            for key, value in self.average.items():
                value.copy_(tensors[f"average.{key}"])
        for name, parameter in self.parameters.items():
            prefix = "optimizer."
            found = {key: tensors[f"{prefix}{key}.{name}"] for key in _MOMENTS
                     if f"{prefix}{key}.{name}" in tensors}
            if found:
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device) for key, value in found.items()}

    def use_average(self) -> None:
        with torch.no_grad():
            for key, value in self.live.items():
                value.copy_(self.average[key])


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def load_average(model: nn.Module, folder: Path) -> int:
    """Put the newest averaged weights of a run into `model`; returns the step they are from."""
    path = checkpoints(folder)[-1]
    tensors = load_file(path)
    prefix = "average."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    missing = model.load_state_dict(state, strict=False).missing_keys
    if any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"{path}: not a checkpoint of this model; it lacks {missing[0]}")
    return int(path.stem.split("-")[1])
