"""Ops: what an edit does at a module. Arithmetic only; the hooks decide when and on which rows.

`weight`  y + s dW x, with dW = up down | W into down | delta, on Linear and Conv2d; masks multiply:
          y + (W o prod_i (1 + s_i (keep_i - 1)) - W) x; one over input features makes x o keep of x.
`adapter` y + s up phi(down (x - center) + bias), at any module: `adapters.py`.
`tokens`  n learned rows behind the text of a cross-attention, as keys and values; in the rows of a
          call that have no prompt, others, if the edit has them.

x is the module's input [rows, ..., in] ([rows, in, h, w] at a convolution), y its output; strengths
are per row, [rows], or per text position, [rows, length]. Every edit starts from the base's own x, y
and W, whatever others do there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptzap.edit import Edit, token_count
from conceptzap.errors import MismatchError, RefusedError, SilentEditError
from conceptzap.words import with_article


def is_conv(module: nn.Module) -> bool:
    return hasattr(module, "kernel_size")


def shifts_input(edit: Edit) -> bool:
    """W into down x = W (into down x): this encoding moves the input instead of adding an output."""
    return edit.op == "weight" and "into" in edit.tensors


def is_low_rank(edit: Edit) -> bool:
    """Whether the edit is a pair that can be concatenated with others along the rank."""
    return edit.op == "weight" and "up" in edit.tensors


def is_mask(edit: Edit) -> bool:
    """Whether single weights are kept or cut, as they are in a tensor or packed into bits."""
    return edit.op == "weight" and ("bits" in edit.tensors or "keep" in edit.tensors) and not thins(edit)


def thins(edit: Edit) -> bool:
    """Whether whole input features are kept or cut: W diag(keep) x = W (keep o x)."""
    return edit.op == "weight" and "keep" in edit.tensors and edit.tensors["keep"].ndim == 1


def pack(keep: Tensor) -> Tensor:
    """A mask [out, ...] as bits [out, bytes], eight to a byte, the first the lowest."""
    flat = keep.flatten(1).to(torch.uint8)
    flat = F.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(-1).to(torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """`pack` undone: the mask of that shape, booleans."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[..., None] >> places) & 1).bool().flatten(1)
    return flat[:, : math.prod(shape[1:])].view(*shape)


class Part:
    """An edit's tensors where its modules compute: each moved and cast once a device and dtype.

    Placed by the activation they meet, so that offloaded modules may come and go. A tensor that is
    trained is cast at every use, inside the graph. Masks of bits stay bits.
    """

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.trained = any(tensor.requires_grad for tensor in edit.tensors.values())
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def slot(self, name: str, like: Tensor) -> Tensor:
        tensor = self.edit.tensors[name]
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.requires_grad or (tensor.device, tensor.dtype) == (like.device, dtype):
            return tensor.to(like.device, dtype)
        key = (name, like.device, dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # it may be used where gradients are recorded
                self._placed[key] = tensor.to(like.device, dtype)
        return self._placed[key]

    def mask(self, weight: Tensor) -> Tensor:
        """What of a weight is kept, in its shape, unpacked once where it is packed."""
        if "keep" in self.edit.tensors:
            return self.slot("keep", weight)
        key = ("mask", weight.device, torch.bool)
        if key not in self._placed:
            self._placed[key] = unpack(self.edit.tensors["bits"].to(weight.device), weight.shape)
        return self._placed[key]


# sets of strengths, each with the rows [rows] or places [rows, length] that have it (None: all do)
Distinct = Sequence[tuple[Sequence[float], Tensor | None]]


class Pair(NamedTuple):
    """Low-rank pairs as one: `down` [R, in], `up` [out, R] (convolutions with their kernels behind).

    `ranks`: how many of the R rows belong to each edit, in order.
    """

    down: Tensor
    up: Tensor
    ranks: tuple[int, ...]


def fuse(parts: Sequence[Part], up: str, like: Tensor) -> Pair:
    """The pairs (`up` or `into`, `down`) of several edits, concatenated along the rank.

    sum_i s_i up_i down_i x = [up_1 ..] diag(s_1 .., s_2 ..) [down_1; ..] x
    """
    downs, ups = ([part.slot(name, like) for part in parts] for name in ("down", up))
    ranks = tuple(len(down) for down in downs)
    if len(parts) == 1:
        return Pair(downs[0], ups[0], ranks)
    return Pair(torch.cat(downs), torch.cat(ups, 1), ranks)


def weigh(strength: Tensor | None, value: Tensor) -> Tensor:
    """`value` [rows, ...] times `strength` [rows, ...], shaped to it; None is 1 everywhere.

    What is shut is dropped and not multiplied by 0, so that an overflow there cannot become NaN.
    """
    if strength is None:
        return value
    strength = strength.view(*strength.shape, *(1,) * (value.ndim - strength.ndim))
    return torch.where(strength == 0, 0, strength * value)


def low_rank(pair: Pair, strength: Tensor | None, module: nn.Module | None, x: Tensor) -> Tensor:
    """up (s down x): x [rows, ..., in] -> [rows, ..., out]; without a module as a Linear does.

    `strength` [rows, R] or [rows, length, R], one for each row of `down`.
    """
    conv = module is not None and is_conv(module)
    inner = _apply(pair.down, module, x) if conv else F.linear(x, pair.down)  # [rows, ..., R]
    if strength is not None:
        between = () if conv else (1,) * (inner.ndim - strength.ndim)
        inner = weigh(strength.view(len(strength), *between, *strength.shape[1:]), inner)
    return F.conv2d(inner, pair.up) if conv else F.linear(inner, pair.up)


def _apply(weight: Tensor, module: nn.Module, x: Tensor) -> Tensor:
    """weight x, in the geometry of the module it changes."""
    if not is_conv(module):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)


def masked(parts: Sequence[Part], strengths: Distinct, module: nn.Module, x: Tensor) -> Tensor:
    """(W o prod_i (1 + s_i (keep_i - 1)) - W) x: masks multiply, so what two prune is pruned once.

    The weight is one for each set of `strengths` that occurs (one number a mask); rows that are shut
    for every mask are in none of them.
    """
    weight = original(module).to(x)
    total: Tensor | None = None
    keeps = [part.mask(weight) for part in parts]
    for numbers, where in strengths:
        change = _apply(weight * (_product(keeps, numbers) - 1).to(weight.dtype), module, x)
        if where is None:
            return change
        where = where.view(*where.shape, *(1,) * (change.ndim - where.ndim))
        total = torch.where(where, change, torch.zeros_like(change) if total is None else total)
    return torch.zeros_like(_apply(weight, module, x)) if total is None else total


def thinned(parts: Sequence[Part], strength: Tensor | None, x: Tensor) -> Tensor:
    """x o prod_i (1 + s_i (keep_i - 1)) over input features; x [rows, ..., in] or pictures.

    `strength` [rows, m] or [rows, length, m], None where all are 1. Where all are 0, x is as it was.
    """
    keeps = torch.stack([part.slot("keep", x).to(x.dtype) for part in parts])  # [m, in]
    if strength is None:
        factor = keeps.prod(0)[None]  # [1, in]
    else:
        open_ = strength[..., None]  # [rows, (length,) m, 1]
        factor = torch.where(open_ == 0, 1, 1 + open_ * (keeps - 1)).prod(-2)  # [rows, (length,) in]
    if x.ndim == 4:
        return x * factor[..., None, None]
    return x * factor.view(len(factor), *(1,) * (x.ndim - factor.ndim), *factor.shape[1:])


def _product(keeps: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """prod_i (1 + s_i (keep_i - 1)), also of masks in bits, which are 1 - s_i where they prune."""
    factors = [
        torch.where(keep, 1.0, 1.0 - s) if keep.dtype == torch.bool else 1 + s * (keep - 1)
        for keep, s in zip(keeps, strengths, strict=True)
    ]
    return math.prod(factors)


def original(module: nn.Module) -> Tensor:
    """The module's weight, also where accelerate keeps it elsewhere while the module is idle."""
    weight, hook = module.weight, getattr(module, "_hf_hook", None)
    if not weight.is_meta:
        return weight
    for one in getattr(hook, "hooks", (hook,)):
        if (kept := getattr(one, "weights_map", None)) is not None:
            return kept["weight"]
    raise RefusedError(
        "a weight that an edit changes is offloaded and cannot be read",
        "attach without offloading, or use enable_model_cpu_offload",
    )


def dense(part: Part, module: nn.Module, x: Tensor) -> Tensor:
    """What a `delta` of strength 1 adds to the module's output for x."""
    return _apply(part.slot("delta", x), module, x)


def weight_delta(edits: Iterable[Edit], module: nn.Module) -> Tensor:
    """dW of all `weight` edits of one module at their strengths, fp32, in the shape of its weight."""
    weight = original(module).detach().float()
    total, kept = torch.zeros_like(weight), torch.ones_like(weight)
    for edit in edits:
        if is_mask(edit) or thins(edit):
            kept = kept * (1 + edit.scale * (_kept(edit, weight) - 1))
            continue
        t = {name: tensor.detach().to(weight) for name, tensor in edit.tensors.items()}
        if "into" in t:
            total += edit.scale * (weight @ t["into"] @ t["down"])
        elif "up" in t:
            total += edit.scale * (t["up"].flatten(1) @ t["down"].flatten(1)).view_as(weight)
        else:
            total += edit.scale * t["delta"]
    return total + weight * (kept - 1)


def _kept(edit: Edit, weight: Tensor) -> Tensor:
    """A mask as numbers that multiply a weight."""
    if not thins(edit):
        return Part(edit).mask(weight).to(weight)
    return edit.tensors["keep"].to(weight).view(1, -1, *(1,) * (weight.ndim - 2))


def _expected(edit: Edit, module: nn.Module) -> dict[str, tuple[int | None, ...]]:
    """Slot -> the shape it must have at this module (None: free)."""
    if edit.op == "tokens":
        inner = (token_count(edit), module.to_k.weight.shape[0])
        context = (token_count(edit), module.to_k.weight.shape[1])
        spaces = {"prompt": context, "tokens": inner}
        both = {f"{slot}{of}": space for slot, space in spaces.items() for of in ("", "_k", "_v")}
        return both | {"without": context}
    out, width, *kernel = module.weight.shape
    ones = (1,) * len(kernel)
    return {
        "up": (out, None, *ones),
        "down": (None, width, *kernel),
        "into": (width, None),
        "delta": (out, width, *kernel),
        "keep": (width,) if thins(edit) else (out, width, *kernel),
        "bits": (out, -(-width * math.prod(kernel) // 8)),
    }


def in_halves(part: Part, rows: Tensor, below: int, whole: int) -> Tensor:
    """Learned rows [rows, n, width], in the first `below` of the `whole` call those `without` a prompt."""
    if not below or "without" not in part.edit.tensors:
        return rows
    if len(rows) != whole:
        raise SilentEditError(
            "a cross-attention was given some of a call's rows, nobody knows which", "run it on all of them"
        )
    return torch.cat([part.slot("without", rows).expand(below, -1, -1), rows[below:]])


def check(edit: Edit, module: nn.Module, site: str) -> None:
    """Raise `MismatchError` unless the tensors of a `weight` or `tokens` edit fit the module at `site`."""
    wanted = ("to_k", "to_v") if edit.op == "tokens" else ("weight",)
    fits = all(getattr(module, name, None) is not None for name in wanted)
    if not fits or (edit.op != "tokens" and module.weight.ndim not in (2, 4)):
        raise MismatchError(
            f"{site} is {with_article(type(module).__name__)}, which cannot take {edit.op!r}",
            "the erasure was made for another architecture",
        )
    if is_conv(module) and shifts_input(edit):
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
