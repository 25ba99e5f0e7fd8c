"""The one optimisation loop, as a generator that yields an `Event` after every step.

A method writes its losses as a generator too. Each is back-propagated while that generator is
suspended, so whatever the method has attached is still attached during backward, every graph is
freed before the next one is built, and the names it yields are the log.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conceptzap.errors import MismatchError, ResourceError, UsageError
from conceptzap.training import memory
from conceptzap.training.session import Session, State, Unkept

Losses = Callable[[int, int, int], Generator[tuple[str, Tensor, str], None, None]]
# the loss scale of half precision (Micikevicius et al. 2018, arXiv 1710.03740): it starts high, is
# halved until the gradients do not overflow, and tried twice as high every so many steps
HALF_SCALE, LARGEST_SCALE = 2.0**20, 2.0**32
RAISED_EVERY = 50


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
    groups: Mapping[str, Group],
    losses: Losses,
    *,
    steps: int,
    batch: int = 1,
    half: bool = False,
    frugal: AbstractContextManager[None] | None = None,
    session: Session | None = None,
) -> Iterator[Event]:
    """Optimise `groups` for `steps` steps of Adam, going on from `session`'s newest checkpoint.

    `losses(step, part, parts)` yields (name, scalar loss, group) for part `part` of `parts` of the
    batch of `step` (from 0), each loss weighted by the part's share of the batch. A loss changes the
    parameters of its group only, a group without a loss rests. All randomness has to come from a
    generator seeded by (seed, step), drawn for the whole batch: then a run that was stopped and
    taken up equals one that was not, bit for bit on a CPU. A session with patience may end it sooner.

    `half`: the model computes in fp16, so losses are scaled for the backward pass and gradients
    scaled back in the parameters' own fp32; where they overflow, the step is done again at half the
    scale. Running out of memory is answered by cutting the `batch` rows into 2, 4, ... parts, at
    last into single rows, then by entering `frugal`, which stays entered until the end.

    Raises `UsageError` (`steps` < 1), `ResourceError` (no memory for a single row; a loss or gradient
    that is not finite: the state before that step is kept), `MismatchError` (a checkpoint of another
    run), `Interrupted` (a signal, with the state saved).
    """
    if steps < 1:
        raise UsageError(f"--steps {steps} is out of range", "use 1 or more")
    trainer = _Trainer(groups, losses, batch, HALF_SCALE if half else 1.0, frugal)
    return _run(trainer, steps, session or Unkept())


def _run(trainer: _Trainer, steps: int, session: Session | Unkept) -> Iterator[Event]:
    began, patience = time.monotonic(), session.patience
    with session.running() as stop, trainer.stack:
        start = trainer.restore(session.restore())
        for step in range(start, steps):
            if patience and patience.over:
                return
            try:
                terms = trainer.backward(step)
            except ResourceError:
                # the failing step has not touched the parameters yet
                _keep(session, trainer, step)
                raise
            trainer.update(step)
            done = step + 1
            if patience:
                patience.look(done, steps)
            if done == steps or session.due() or (patience and patience.over):
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
    """Groups, their Adams, in how many parts a batch is computed, and the loss scale."""

    def __init__(
        self,
        groups: Mapping[str, Group],
        losses: Losses,
        batch: int,
        scale: float,
        frugal: AbstractContextManager[None] | None,
    ) -> None:
        self.groups, self.losses, self.batch, self.frugal = groups, losses, batch, frugal
        self.parts, self.scale, self.half = 1, scale, scale != 1
        self.stack = ExitStack()
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
        """Gradients of one step and the value of each term, with less memory or scale if need be."""
        while True:
            self._forget()
            try:
                terms = self._backward(step)
            except (MemoryError, RuntimeError) as error:
                lack = memory.shortage(error)
                if not lack:
                    raise
            else:
                if self._take_gradients(step):
                    return terms
                continue
            # out here, where the error no longer holds the frames that hold the tensors
            self._forget()
            memory.release()
            if not self._use_less():
                raise ResourceError(
                    f"out of memory at step {step + 1}, one row at a time too: {lack}",
                    "close other programs, or use another --device or --dtype",
                )

    def _use_less(self) -> bool:
        """Cut the batch into twice as many parts, at last save activations; False if all is done."""
        if self.parts < self.batch:
            self.parts = min(2 * self.parts, self.batch)
        elif self.frugal is not None:
            self.stack.enter_context(self.frugal)
            self.frugal = None
        else:
            return False
        return True

    def _backward(self, step: int) -> dict[str, float]:
        terms: dict[str, float] = {}
        for part in range(self.parts):
            with closing(self.losses(step, part, self.parts)) as pending:
                for name, loss, group in pending:
                    value = loss.item()
                    if not math.isfinite(value):
                        raise _diverged(f"the loss {name!r} is {value}", step)
                    inputs = list(self.groups[group].params.values())
                    torch.autograd.backward(loss * self.scale, inputs=inputs)
                    terms[name] = terms.get(name, 0.0) + value
        return terms

    def _take_gradients(self, step: int) -> bool:
        """Unscale and clip the gradients; False where they overflowed, with the scale halved."""
        for name, group in self.groups.items():
            params = list(group.params.values())
            for gradient in (p.grad for p in params if p.grad is not None and self.half):
                gradient.div_(self.scale)  # exact: the scale is a power of 2
            limit = math.inf if group.clip is None else group.clip
            norm = nn.utils.clip_grad_norm_(params, limit, foreach=False)
            if norm.isfinite():
                continue
            if self.scale <= 1:
                raise _diverged(f"the gradient of {name!r} is {norm.item()}", step)
            self.scale /= 2
            return False
        return True

    def update(self, step: int) -> None:
        """Adam's step where there are gradients; after a `ResourceError` the state is torn."""
        try:
            for adam in self.adams.values():
                adam.step()
        except (MemoryError, RuntimeError) as error:
            lack = memory.shortage(error)
            if not lack:
                raise
            raise ResourceError(
                f"out of memory in the update of step {step + 1}: {lack}",
                "close other programs, or use another --device",
            ) from error
        self._forget()
        if self.half and (step + 1) % RAISED_EVERY == 0:
            self.scale = min(2 * self.scale, LARGEST_SCALE)

    def _forget(self) -> None:
        for adam in self.adams.values():
            adam.zero_grad(set_to_none=True)

    def state(self, step: int) -> State:
        """What the next step depends on: copies on the CPU, named `group/parameter/slot`."""
        tensors = {}
        for name, parameter, adam in self._parameters():
            slots = {"value": parameter, **adam.state.get(parameter, {})}
            for slot, tensor in slots.items():
                tensors[f"{name}/{slot}"] = tensor.detach().to("cpu", copy=True).contiguous()
        return State(step, self.parts, tensors, self.scale)

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
        self.parts, self.scale = state.parts, state.scale
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
