"""Gates: a factor 0..1 on an edit, read once per UNet call from each row's text states and timestep.

`match` and `window` are hard (0 or 1, a row is in or out), `curve` is soft, `token` is hard per text
position. A gate never sees the prompt's string, so embeddings handed in directly are judged like any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conceptzap.edit import Edit, Gate
from conceptzap.errors import MismatchError


@dataclass(frozen=True)
class Signal:
    """What one UNet call tells the gates: text states [rows, length, width], timesteps [rows]."""

    states: Tensor
    timesteps: Tensor

    @property
    def rows(self) -> int:
        return len(self.states)


def check(gate: Gate, width: int) -> None:
    """Raise `MismatchError` unless the gate's tensors fit text states of this width, and each other."""
    shapes = {slot: tuple(tensor.shape) for slot, tensor in gate.tensors.items()}
    if gate.kind in ("match", "token"):
        query, mean = shapes["query"], shapes["mean"]
        if len(query) != 2 or query[1] != width or mean != (width,):
            raise MismatchError(
                f"a {gate.kind!r} gate reads text states {query[-1]} wide, this base has {width}",
                "the erasure was made for another architecture",
            )
    if gate.kind == "curve":
        times = gate.tensors["times"]
        sound = times.ndim == 1 and len(times) > 1 and shapes["times"] == shapes["values"]
        if not (sound and bool((times.diff() > 0).all())):
            raise MismatchError(
                "a 'curve' gate needs two or more rising times with one value each",
                "make the erasure again",
            )


def scores(gate: Gate, states: Tensor) -> Tensor:
    """max_i query_i . (c / |c| - mean) at every text position: [rows, length].

    Unit length makes the score blind to prompt weighting, which only scales the states.
    """
    query, mean = (gate.tensors[slot].to(states.device, torch.float32) for slot in ("query", "mean"))
    unit = torch.nn.functional.normalize(states.float(), dim=-1) - mean
    return (unit @ query.T).amax(-1)


def _match(gate: Gate, signal: Signal) -> Tensor:
    return (scores(gate, signal.states).amax(-1) > gate.params["threshold"]).float()


def _token(gate: Gate, signal: Signal) -> Tensor:
    return (scores(gate, signal.states) > gate.params["threshold"]).float()


def _window(gate: Gate, signal: Signal) -> Tensor:
    t = signal.timesteps
    return ((t >= gate.params["low"]) & (t <= gate.params["high"])).float()


def _curve(gate: Gate, signal: Signal) -> Tensor:
    """Linear between the given times, constant beyond them, never outside 0..1."""
    times, values = (gate.tensors[slot].to(signal.timesteps) for slot in ("times", "values"))
    right = torch.searchsorted(times, signal.timesteps).clamp(max=len(times) - 1)
    left = (right - 1).clamp(min=0)
    gap = (times[right] - times[left]).clamp(min=1e-6)
    part = ((signal.timesteps - times[left]) / gap).clamp(0, 1)
    return (values[left] + part * (values[right] - values[left])).clamp(0, 1)


KINDS = {"match": _match, "token": _token, "window": _window, "curve": _curve}
TIMED = ("window", "curve")  # these read the timestep, the others the text alone


def factor(edit: Edit, signal: Signal) -> Tensor:
    """The product of an edit's gates: [rows], or [rows, length] when a `token` gate takes part."""
    product = torch.ones(signal.rows, device=signal.states.device)
    for gate in edit.gates:
        value = KINDS[gate.kind](gate, signal)
        if value.ndim > product.ndim:
            product = product[:, None]
        elif value.ndim < product.ndim:
            value = value[:, None]
        product = product * value
    return product
