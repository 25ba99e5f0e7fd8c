"""The op `adapter`: a small network beside any module of the UNet, reading and writing its features.

    y + s up (gain o h),  h = phi(down (x - center) + bias)         reads x or y, writes y or x

A feature of h that is not above its `threshold` is 0. `gain` and `threshold` are numbers a feature, [r],
or at each of some timesteps, [times, r], of which the nearest holds. x is the first of the module's
inputs, y its output or the first of its outputs. Features are the last dimension, of pictures
[rows, c, h, w] the channels.

phi `attend` first lets the positions of a text look at each other: x becomes g o A x with
A = softmax(x Q^T Q x^T) and g = sigmoid(A x . gate) (CPE, Lee et al. 2025); `project` takes the place of
all of it at a layer of text (`projected`). What is written into x the module itself then reads: at
`up_blocks.i.resnets.j`, whose x is [decoder | skip], that is how a skip connection is edited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptzap.edit import Edit
from conceptzap.errors import MismatchError, RefusedError
from conceptzap.runtime.ops import Part, original

OTHER = "the erasure was made for another architecture"
PHI = {"none": lambda h: h, "relu": F.relu, "gelu": F.gelu}
SAME = 1e-3  # what is left of a value, as a share of it, that counts as nothing
# how modules without a weight say their widths: features that go out, features that come in
WIDTHS = (
    ("out_channels", "in_channels"),
    ("out_channels", "channels"),
    ("out_dim", "query_dim"),
    ("dim", "dim"),
)


def is_adapter(edit: Edit) -> bool:
    return edit.op == "adapter"


def projects(edit: Edit) -> bool:
    return edit.params.get("phi") == "project"


def reads_output(edit: Edit) -> bool:
    """Whether the edit looks at the module's output instead of its input."""
    return is_adapter(edit) and (edit.params.get("reads", "x") == "y" or projects(edit))


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
    if phi == "attend":
        return h
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


def attended(part: Part, x: Tensor) -> Tensor:
    """g o A x of rows x [rows, length, width]: what each position is told by those like it."""
    asked = F.linear(x, part.slot("query", x))  # [rows, length, q]
    told = (asked @ asked.transpose(-1, -2)).softmax(-1) @ x
    return (told @ part.slot("gate", x)).sigmoid()[..., None] * told


def projected(part: Part, module: nn.Module, y: Tensor) -> Tensor:
    """What each position of y [rows, length, out] says of the concept at that position, to be taken away.

    sum_i (<b_i, y> / <b_i, b_i>) b'_i with b_i the concepts' values W p_i made orthogonal to each other and
    b'_i the same combinations of w_i W p_i, w_i = height sigmoid(slope (cos(y, W p_i) - shift)) (AdaVD, Wang
    et al. 2024). The first position, which is the same for all texts, stays; longer texts begin anew.
    """
    params, prompt = part.edit.params, part.slot("prompt", y)  # [k, n, width]
    place = torch.arange(y.shape[1], device=y.device) % prompt.shape[1]
    values = F.linear(prompt, original(module).to(y))[:, place]  # [k, length, out]
    own: list[Tensor] = []  # b_i [length, out]
    weighted: list[Tensor] = []  # b'_i [rows, length, out]
    total = torch.zeros_like(y)
    for value in values:
        near = F.cosine_similarity(y, value, dim=-1)[..., None]  # [rows, length, 1]
        weight = params["height"] * (params["slope"] * (near - params["shift"])).sigmoid()
        base, shown = value, weight * value
        for before, told in zip(own, weighted, strict=True):
            share = _share(before, value)
            base, shown = base - share * before, shown - share * told
        # where a concept says what another said, as in the first words of one wording, nothing is left
        own.append(torch.where(base.norm(dim=-1) > SAME * value.norm(dim=-1), base.mT, 0).mT)
        weighted.append(shown)
        total = total + _share(own[-1], y) * shown
    return total.masked_fill((place == 0)[:, None], 0)


def _share(direction: Tensor, of: Tensor) -> Tensor:
    """<b, v> / <b, b> over the last dimension, which stays with length 1."""
    length = direction.float().square().sum(-1, keepdim=True).clamp_min(1e-12)
    return ((direction.float() * of.float()).sum(-1, keepdim=True) / length).to(of)


def change(
    part: Part, path: str, module: nn.Module, x: Tensor, y: Tensor | None, times: Tensor | None
) -> Tensor:
    """What an adapter of strength 1 adds to y (y None: to x), in its shape, at timesteps [rows]."""
    edit, wanted = part.edit, x if y is None else y
    if projects(edit):
        return -projected(part, module, wanted)
    features = _last(y if y is not None and reads_output(edit) else x)  # [rows, ..., d]
    width = edit.tensors["down"].shape[1]
    if features.shape[-1] != width:
        raise MismatchError(f"{path} has {features.shape[-1]} features, the erasure reads {width}", OTHER)
    if "query" in edit.tensors:
        features = attended(part, features)
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
    if edit.params.get("phi") in ("project", "attend") and not isinstance(module, nn.Linear):
        raise MismatchError(f"{site} is no layer of text, which alone has positions", OTHER)
    out, into = widths(module)
    read, written = (out if reads_output(edit) else into), (into if writes_input(edit) else out)
    wanted = {"prompt": (None, None, into)} if projects(edit) else _expected(edit, read, written)
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
    asking = {"query": (None, read), "gate": (read,)}
    return pair | asking | {"bias": (rank,), "center": (read,), "times": (steps,)} | timed
