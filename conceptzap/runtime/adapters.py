"""The op `adapter`: a small network beside any module of the UNet, reading and writing its features.

    y + s up (gain o h),  h = phi(down (x - center) + bias)         reads x or y, writes y or x

A feature of h that is not above its `threshold` is 0. `gain` and `threshold` are numbers a feature, [r],
or at each of some timesteps, [times, r], of which the nearest holds. x is the first of the module's
inputs, y its output or the first of its outputs. Features are the last dimension, of pictures
[rows, c, h, w] the channels. What is written into x the module itself then reads: at
`up_blocks.i.resnets.j`, whose x is [decoder | skip], that is how a skip connection is edited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptzap.edit import Edit
from conceptzap.errors import MismatchError, RefusedError
from conceptzap.runtime.ops import Part

OTHER = "the erasure was made for another architecture"
PHI = {"none": lambda h: h, "relu": F.relu, "gelu": F.gelu}
# how modules without a weight say their widths: features that go out, features that come in
WIDTHS = (
    ("out_channels", "in_channels"),
    ("out_channels", "channels"),
    ("out_dim", "query_dim"),
    ("dim", "dim"),
)


def is_adapter(edit: Edit) -> bool:
    return edit.op == "adapter"


def reads_output(edit: Edit) -> bool:
    """Whether the edit looks at the module's output instead of its input."""
    return is_adapter(edit) and edit.params.get("reads", "x") == "y"


def writes_input(edit: Edit) -> bool:
    """Whether the edit changes what the module reads instead of what it gives."""
    return is_adapter(edit) and edit.params.get("writes", "y") == "x"


# -- what goes in and out of a module


def given(path: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first of a module's inputs, by place or by name; raises `RefusedError` where it is no tensor."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(first, Tensor):
        message = f"{path} was given no tensor that an edit could read"
        raise RefusedError(message, "call the UNet as diffusers does")
    return first


def regiven(args: tuple, kwargs: dict[str, Any], first: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The same inputs with another first one."""
    if args:
        return (first, *args[1:]), kwargs
    return args, kwargs | {next(iter(kwargs)): first}


def made(path: str, output: Any) -> Tensor:
    """A module's output, or the first of them; raises `RefusedError` where it is no tensor."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        message = f"{path} gives no tensor that an edit could change"
        raise RefusedError(message, "call it with return_dict=False")
    return first


def remade(output: Any, first: Tensor) -> Any:
    """The same output with another first member."""
    return (first, *output[1:]) if isinstance(output, tuple) else first


# -- arithmetic


def _last(x: Tensor) -> Tensor:
    """Features last: [rows, c, h, w] -> [rows, h, w, c]."""
    return x.movedim(1, -1) if x.ndim == 4 else x


def _activate(edit: Edit, h: Tensor) -> Tensor:
    phi = edit.params.get("phi", "none")
    if phi == "topk":
        top = h.topk(min(int(edit.params["k"]), h.shape[-1]), dim=-1)
        return torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
    return PHI[phi](h)


def at_times(part: Part, slot: str, times: Tensor | None, like: Tensor) -> Tensor:
    """A slot [r] or, of [times, r], the row of the nearest timestep for each row: [rows, 1, ..., r]."""
    value = part.slot(slot, like)
    if value.ndim == 1:
        return value
    stored = part.edit.tensors["times"].float().cpu()
    nearest = (times[:, None] - stored).abs().argmin(1).to(value.device)  # [rows]
    return value[nearest].view(len(nearest), *(1,) * (like.ndim - 2), -1)


def _amplified(part: Part, h: Tensor, times: Tensor | None) -> Tensor:
    if "threshold" in part.edit.tensors:
        h = torch.where(h > at_times(part, "threshold", times, h), h, 0)
    return h * at_times(part, "gain", times, h) if "gain" in part.edit.tensors else h


def change(part: Part, path: str, x: Tensor, y: Tensor | None, times: Tensor | None) -> Tensor:
    """What an adapter of strength 1 adds to y (y None: to x), in its shape, at timesteps [rows]."""
    edit, wanted = part.edit, x if y is None else y
    features = _last(y if y is not None and reads_output(edit) else x)  # [rows, ..., d]
    width = edit.tensors["down"].shape[1]
    if features.shape[-1] != width:
        raise MismatchError(f"{path} has {features.shape[-1]} features, the erasure reads {width}", OTHER)
    if "center" in edit.tensors:
        features = features - part.slot("center", features)
    bias = part.slot("bias", features) if "bias" in edit.tensors else None
    inner = _activate(edit, F.linear(features, part.slot("down", features), bias))  # [rows, ..., r]
    added = F.linear(_amplified(part, inner, times), part.slot("up", features))
    added = added.movedim(-1, 1) if added.ndim == 4 else added
    if added.shape != wanted.shape:
        raise MismatchError(
            f"at {path} the erasure adds {list(added.shape)} to {list(wanted.shape)}",
            "where a module changes the size of pictures, an adapter must read what it writes",
        )
    return added


# -- what fits


class Widths(NamedTuple):
    """Features that go out of a module and come in, None where it does not say."""

    out: int | None
    into: int | None


def widths(module: nn.Module) -> Widths:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        if weight.ndim == 1:  # a norm
            return Widths(len(weight), len(weight))
        return Widths(weight.shape[0], weight.shape[1] * getattr(module, "groups", 1))
    for out, into in WIDTHS:
        found = getattr(module, out, None), getattr(module, into, None)
        if all(isinstance(one, int) for one in found):
            return Widths(*found)
    return Widths(None, None)


def check(edit: Edit, module: nn.Module, site: str) -> None:
    """Raise `MismatchError` unless the adapter fits the module at `site`, as far as it can be told."""
    # a list of modules is never run, an embedding reads ids
    if type(module).forward is nn.Module.forward or isinstance(module, nn.Embedding):
        raise MismatchError(f"{site} is a {type(module).__name__}, which cannot take {edit.op!r}", OTHER)
    if writes_input(edit) and reads_output(edit):
        message = f"at {site} an adapter cannot write the input and read the output"
        raise MismatchError(message, "make the erasure again")
    out, into = widths(module)
    read, written = (out if reads_output(edit) else into), (into if writes_input(edit) else out)
    wanted = _expected(edit, read, written)
    for name, tensor in edit.tensors.items():
        have, want = tuple(tensor.shape), wanted[name]
        if len(have) != len(want) or any(w not in (None, h) for h, w in zip(have, want, strict=True)):
            shape = ", ".join("n" if size is None else str(size) for size in want)
            message = f"{site} needs {name} of shape [{shape}], the erasure has {list(have)}"
            raise MismatchError(message, OTHER)


def _expected(edit: Edit, read: int | None, written: int | None) -> dict[str, tuple[int | None, ...]]:
    """Slot -> the shape it must have where these features are read and written (None: free)."""
    rank = len(edit.tensors["down"])
    steps = edit.tensors["times"].numel() if "times" in edit.tensors else 0
    timed = {
        name: (steps, rank) if steps and edit.tensors[name].ndim == 2 else (rank,)
        for name in ("gain", "threshold")
        if name in edit.tensors
    }
    pair = {"up": (written, rank), "down": (rank, read)}
    return pair | {"bias": (rank,), "center": (read,), "times": (steps,)} | timed
