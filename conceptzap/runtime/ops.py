"""Ops: what an edit does at a module. Arithmetic only; `attach` decides when and on which rows.

`weight`  y + s dW x, with dW = up down | W into down | delta | W (keep - 1), on Linear and Conv2d.
`adapter` y + s up phi(down (x - center) + bias).
`tokens`  n learned rows behind the text of a cross-attention, as keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptzap.edit import Edit
from conceptzap.errors import MismatchError

PHI = {
    "none": lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
}


def is_conv(module: nn.Module) -> bool:
    return hasattr(module, "kernel_size")


def token_count(edit: Edit) -> int:
    return next(iter(edit.tensors.values())).shape[0]


def slot(edit: Edit, name: str, like: Tensor) -> Tensor:
    """A tensor of the edit on the device and in the dtype of the activations it meets."""
    return edit.tensors[name].to(like.device, like.dtype)


def shifts_input(edit: Edit) -> bool:
    """W into down x = W (into down x): this encoding moves the input instead of adding an output."""
    return edit.op == "weight" and "into" in edit.tensors


def reads_output(edit: Edit) -> bool:
    """Whether the edit looks at the module's output instead of its input."""
    return edit.op == "adapter" and edit.params.get("reads", "x") == "y"


def shift(edit: Edit, x: Tensor) -> Tensor:
    """into (down x): what to add to the input x [..., in]."""
    return F.linear(F.linear(x, slot(edit, "down", x)), slot(edit, "into", x))


def _apply(weight: Tensor, module: nn.Module, x: Tensor) -> Tensor:
    """weight x, in the geometry of the module it changes."""
    if not is_conv(module):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)


def _activate(edit: Edit, h: Tensor) -> Tensor:
    phi = edit.params.get("phi", "none")
    if phi == "topk":
        top = h.topk(min(int(edit.params["k"]), h.shape[-1]), dim=-1)
        return torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
    return PHI[phi](h)


def _adapter(edit: Edit, x: Tensor) -> Tensor:
    if "center" in edit.tensors:
        x = x - slot(edit, "center", x)
    bias = slot(edit, "bias", x) if "bias" in edit.tensors else None
    return F.linear(_activate(edit, F.linear(x, slot(edit, "down", x), bias)), slot(edit, "up", x))


def change(edit: Edit, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a `weight` or `adapter` edit of strength 1 adds to y, the module's output for x."""
    if edit.op == "adapter":
        return _adapter(edit, y if reads_output(edit) else x)
    if "up" in edit.tensors:
        inner = _apply(slot(edit, "down", x), module, x)
        up = slot(edit, "up", x)
        return F.conv2d(inner, up) if is_conv(module) else F.linear(inner, up)
    if "delta" in edit.tensors:
        return _apply(slot(edit, "delta", x), module, x)
    weight = module.weight.to(x.dtype)
    return _apply(weight * (slot(edit, "keep", x) - 1), module, x)


def weight_delta(edit: Edit, module: nn.Module) -> Tensor:
    """dW of a `weight` edit at its strength, fp32, in the shape of the module's weight."""
    weight = module.weight.detach().float()
    t = {name: tensor.detach().to(weight) for name, tensor in edit.tensors.items()}
    if "into" in t:
        delta = weight @ t["into"] @ t["down"]
    elif "up" in t:
        delta = (t["up"].flatten(1) @ t["down"].flatten(1)).view_as(weight)
    else:
        delta = t["delta"] if "delta" in t else weight * (t["keep"] - 1)
    return edit.scale * delta


def _expected(edit: Edit, module: nn.Module) -> dict[str, tuple[int | None, ...]]:
    """Slot -> the shape it must have at this module (None: free)."""
    if edit.op == "tokens":
        inner = (None, module.to_k.weight.shape[0])
        context = (None, module.to_k.weight.shape[1])
        return {"prompt_k": context, "prompt_v": context, "tokens_k": inner, "tokens_v": inner}
    out, width, *kernel = module.weight.shape
    if edit.op == "adapter":
        reads = out if reads_output(edit) else width
        return {"up": (out, None), "down": (None, reads), "bias": (None,), "center": (reads,)}
    ones = (1,) * len(kernel)
    return {
        "up": (out, None, *ones),
        "down": (None, width, *kernel),
        "into": (width, None),
        "delta": (out, width, *kernel),
        "keep": (out, width, *kernel),
    }


def check(edit: Edit, module: nn.Module, site: str) -> None:
    """Raise `MismatchError` unless the edit's op and tensors fit the module at `site`."""
    wanted = ("to_k", "to_v") if edit.op == "tokens" else ("weight",)
    if not all(hasattr(module, name) for name in wanted):
        raise MismatchError(
            f"{site} is a {type(module).__name__}, which cannot take {edit.op!r}",
            "the erasure was made for another architecture",
        )
    if is_conv(module) and (shifts_input(edit) or edit.op == "adapter"):
        raise MismatchError(f"{site} is a convolution, which cannot take this {edit.op!r}", "")
    for name, shape in _expected(edit, module).items():
        have = tuple(edit.tensors[name].shape) if name in edit.tensors else None
        if have is not None and not _fits(have, shape):
            raise MismatchError(
                f"{site} needs {name} of shape {_show(shape)}, the erasure has {_show(have)}",
                "the erasure was made for another architecture",
            )


def _fits(have: tuple[int, ...], want: tuple[int | None, ...]) -> bool:
    return len(have) == len(want) and all(w in (None, h) for h, w in zip(have, want, strict=True))


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("n" if size is None else str(size) for size in shape) + "]"
