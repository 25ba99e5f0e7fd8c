"""The one optimisation loop, as a generator that yields an `Event` after every step.

A method writes its losses as a generator too. Each is back-propagated while that generator is
suspended, so whatever the method has attached is still attached during backward, every graph is
freed before the next one is built, and the names it yields are the log.
"""

from __future__ import annotations

import gc
import math
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conceptzap.errors import (
    MismatchError,
    ResourceError,
    UsageError,
    ran_out_of_memory,
)
from conceptzap.training.session import Session, State, Unkept

Losses = Callable[[int, int, int], Generator[tuple[str, Tensor, str], None, None]]


@dataclass(frozen=True)
class Group:
    """Parameters with losses and an Adam of their own (Kingma and Ba 2015, arXiv 1412.6980).

    `clip` bounds the norm of the group's gradient. Raises `UsageError` for values out of range.
    """

    params: Mapping[str, nn.Parameter]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"a learning rate of {self.lr} is out of range", "use one above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas {self.betas} are out of range", "use 0 <= beta < 1")
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"clip {self.clip} is out of range", "use one above 0, or none")


@dataclass(frozen=True)
class Event:
    """`step` of `total` is done; `terms` are its losses, `seconds` have passed since the start."""

    step: int
    total: int
    terms: Mapping[str, float]
    seconds: float


def train(
    groups: Mapping[str, Group], losses: Losses, *, steps: int, session: Session | None = None
) -> Iterator[Event]:
    """Optimise `groups` for `steps` steps of Adam, going on from `session`'s newest checkpoint.

    `losses(step, part, parts)` yields (name, scalar loss, group) for part `part` of `parts` of the
    batch of `step` (from 0), its losses already divided by `parts`; a part may be empty. A loss
    changes the parameters of its group only, a group without a loss rests. All randomness has to
    come from a generator seeded by (seed, step), drawn for the whole batch: then a run that was
    stopped and taken up equals one that was not, bit for bit on a CPU.

    Running out of memory is answered once, with halved batches from there on. Raises `UsageError`
    (`steps` < 1), `ResourceError` (no memory at half batch either; a loss or gradient that is not
    finite: the state before that step is kept), `MismatchError` (a checkpoint of another run),
    `Interrupted` (a signal, with the state saved).
    """
    if steps < 1:
        raise UsageError(f"--steps {steps} is out of range", "use 1 or more")
    return _run(_Trainer(groups, losses), steps, session or Unkept())


def _run(trainer: _Trainer, steps: int, session: Session | Unkept) -> Iterator[Event]:
    began = time.monotonic()
    with session.running() as stop:
        start = trainer.restore(session.restore())
        for step in range(start, steps):
            try:
                terms = trainer.backward(step)
            except ResourceError:
                # the failing step has not touched the parameters yet
                _keep(session, trainer, step)
                raise
            trainer.update(step)
            done = step + 1
            if done == steps or session.due():
                _keep(session, trainer, done)
            yield Event(done, steps, terms, time.monotonic() - began)
            if stop.signum:
                _keep(session, trainer, done)
                raise stop.error(done, steps)


def _keep(session: Session | Unkept, trainer: _Trainer, step: int) -> None:
    """Save, unless that would put a broken state in the place of a good one."""
    state = trainer.state(step)
    if all(bool(tensor.isfinite().all()) for tensor in state.tensors.values()):
        session.save(state)


class _Trainer:
    """Groups, their Adams, and in how many parts a batch is computed."""

    def __init__(self, groups: Mapping[str, Group], losses: Losses) -> None:
        self.groups, self.losses, self.parts = groups, losses, 1
        # one loop over the parameters: the fused and foreach forms may round otherwise elsewhere
        self.adams = {
            name: torch.optim.Adam(
                list(group.params.values()),
                lr=group.lr,
                betas=group.betas,
                foreach=False,
                fused=False,
            )
            for name, group in groups.items()
        }

    def backward(self, step: int) -> dict[str, float]:
        """Gradients of one step and the value of each term; halves the batch if memory runs out."""
        for parts in range(self.parts, 3):
            self.parts = parts
            self._forget()
            try:
                return self._backward(step)
            except (MemoryError, RuntimeError) as error:
                shortage = _shortage(error)
                if not shortage:
                    raise
            # out here, where the error no longer holds the frames that hold the tensors
            self._free()
        raise ResourceError(
            f"out of memory at step {step + 1}, at half batch too: {shortage}",
            "close other programs, use a smaller batch, or another --device",
        )

    def _backward(self, step: int) -> dict[str, float]:
        terms: dict[str, float] = {}
        for part in range(self.parts):
            with closing(self.losses(step, part, self.parts)) as pending:
                for name, loss, group in pending:
                    value = loss.item()
                    if not math.isfinite(value):
                        raise _diverged(f"the loss {name!r} is {value}", step)
                    inputs = list(self.groups[group].params.values())
                    torch.autograd.backward(loss, inputs=inputs)
                    terms[name] = terms.get(name, 0.0) + value
        self._bound_gradients(step)
        return terms

    def _bound_gradients(self, step: int) -> None:
        for name, group in self.groups.items():
            limit = math.inf if group.clip is None else group.clip
            norm = nn.utils.clip_grad_norm_(list(group.params.values()), limit, foreach=False)
            if not norm.isfinite():
                raise _diverged(f"the gradient of {name!r} is {norm.item()}", step)

    def update(self, step: int) -> None:
        """Adam's step where there are gradients; after a `ResourceError` the state is torn."""
        try:
            for adam in self.adams.values():
                adam.step()
        except (MemoryError, RuntimeError) as error:
            shortage = _shortage(error)
            if not shortage:
                raise
            raise ResourceError(
                f"out of memory in the update of step {step + 1}: {shortage}",
                "close other programs, or use another --device",
            ) from error
        self._forget()

    def _forget(self) -> None:
        for adam in self.adams.values():
            adam.zero_grad(set_to_none=True)

    def _free(self) -> None:
        self._forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def state(self, step: int) -> State:
        """What the next step depends on: copies on the CPU, named `group/parameter/slot`."""
        tensors = {}
        for name, parameter, adam in self._parameters():
            slots = {"value": parameter, **adam.state.get(parameter, {})}
            for slot, tensor in slots.items():
                tensors[f"{name}/{slot}"] = tensor.detach().to("cpu", copy=True).contiguous()
        return State(step, self.parts, tensors)

    def restore(self, state: State) -> int:
        """Take a state up, return its step; `MismatchError` if it has other parameters."""
        if not state.tensors:
            return 0
        saved = {
            name: list(t.shape) for name, t in state.tensors.items() if name.endswith("/value")
        }
        here = {f"{name}/value": list(p.shape) for name, p, _ in self._parameters()}
        if saved != here:
            raise MismatchError(
                "the saved run trains other parameters than this one", "start anew without --resume"
            )
        self.parts = state.parts
        for name, parameter, adam in self._parameters():
            parameter.data.copy_(state.tensors[f"{name}/value"])
            if f"{name}/step" in state.tensors:
                # Adam keeps its count of steps on the CPU
                places = {
                    "exp_avg": parameter.device,
                    "exp_avg_sq": parameter.device,
                    "step": "cpu",
                }
                adam.state[parameter] = {
                    slot: state.tensors[f"{name}/{slot}"].to(place)
                    for slot, place in places.items()
                }
        return state.step

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Adam]]:
        for name, group in self.groups.items():
            for key, parameter in group.params.items():
                yield f"{name}/{key}", parameter, self.adams[name]


def _diverged(what: str, step: int) -> ResourceError:
    return ResourceError(f"{what} at step {step + 1}: the training diverged", "lower lr")


def _shortage(error: BaseException) -> str:
    """What was asked for and what is free, if the error is one of memory, else ""."""
    if not ran_out_of_memory(error):
        return ""
    asked = re.search(r"allocate ([\d.]+) ?(bytes|[KMG]iB)", str(error))
    wanted = f"{asked[1]} {asked[2]}" if asked else "an unknown size"
    return f"{wanted} asked for, {_free_bytes() / 2**30:.1f} GiB free"


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
