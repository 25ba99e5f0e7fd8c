"""Edits on a UNet of the original Stable Diffusion code, as ComfyUI, Forge and webui run it.

`Mirror` shows such a UNet under diffusers' names, which is all that an attachment needs: the layers are the
same. Two kinds of modules are called otherwise, and are spoken to through a hook before ours and one after:
the UNet itself (`context` for `encoder_hidden_states`) and its cross-attentions (`mask` for
`attention_mask`). Rows are whatever the program batches; gates read the `context` of each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat, nn

from conceptzap.base import identity
from conceptzap.base.original import RESNET
from conceptzap.edit import Edit, Erasure, sort_edits
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime.attach import Attachment
from conceptzap.runtime.gates import SIGHT
from conceptzap.runtime.guides import Guidance
from conceptzap.runtime.receipt import STRIPPED, Receipt

INNER = {new.replace("\\.", ""): old.strip(".") for new, old in RESNET}
FIXED = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block": "middle_block", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip


def _paths(unet: Any) -> dict[str, str]:
    """diffusers' path of every block and of the modules it is made of -> the original code's."""
    found = dict(FIXED)
    for way, stem in (("down", "input_blocks"), ("up", "output_blocks")):
        level = inner = 0
        for number, block in enumerate(getattr(unet, stem)):
            if way == "down" and not number:
                continue
            here = f"{way}_blocks.{level}"
            found[here] = f"{stem}.{number}"  # the last of a level is what the level gives
            changes = False
            for column, part in enumerate(block):
                path = f"{stem}.{number}.{column}"
                if hasattr(part, "in_layers"):
                    found[f"{here}.resnets.{inner}"] = path
                elif hasattr(part, "transformer_blocks"):
                    found[f"{here}.attentions.{inner}"] = path
                else:  # a change of size ends the level
                    name = "op" if hasattr(part, "op") else "conv"
                    found[f"{here}.{way}samplers.0"] = path
                    found[f"{here}.{way}samplers.0.conv"] = f"{path}.{name}"
                    changes = True
            level, inner = (level + 1, 0) if changes else (level, inner + 1)
    return found


class Mirror:
    """The UNet under diffusers' names, for an attachment; hooks go to the modules themselves."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self._known = unet, _paths(unet)
        self.cross = [m for name, m in unet.named_modules() if name.endswith("attn2")]
        self.config = SimpleNamespace(cross_attention_dim=self.cross[0].to_k.weight.shape[1])
        self.modules = unet.modules
        self.register_forward_pre_hook = unet.register_forward_pre_hook
        self.register_forward_hook = unet.register_forward_hook

    @property
    def _forward_pre_hooks(self) -> Any:
        return self.unet._forward_pre_hooks

    def get_submodule(self, path: str) -> nn.Module:
        return self.unet.get_submodule(self.original(path))

    def original(self, path: str) -> str:
        """`down_blocks.0.resnets.0.conv1` -> `input_blocks.1.0.in_layers.2`."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if known := self._known.get(".".join(parts[:end])):
                inside = parts[end:]
                if inside and parts[end - 2] == "resnets":
                    inside[0] = INNER.get(inside[0], inside[0])
                return ".".join([known, *inside])
        return path

    def names(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters of cross-attention by diffusers' names, for a fingerprint."""
        paths = {other: path for path, other in self._known.items() if ".attentions." in path}
        for name, value in self.unet.named_parameters():
            stem = next((p for p in (".".join(name.split(".")[:n]) for n in (3, 2)) if p in paths), None)
            if stem and ".attn2." in name:
                yield paths[stem] + name.removeprefix(stem), value


class Erased:
    """Erasures on a UNet of the original code, in force inside `acting` alone.

    `attend`: cross-attention is computed here, where the program's own passes over masks (webui's xformers).
    Raises `MismatchError` where an erasure does not fit, and `RefusedError` for guides, which need a pipeline
    that conceptzap knows.
    """

    def __init__(
        self, unet: nn.Module, erasures: Sequence[tuple[Erasure, float]], attend: bool = False
    ) -> None:
        self.erasures, self._attend = tuple(erasures), attend
        edits = [edit.scaled(strength) for one, strength in erasures for edit in one.edits if strength]
        if any(edit.op == "guide" for edit in edits):
            raise RefusedError("an erasure that guides cannot act here", "draw with conceptzap or diffusers")
        self.mirror = Mirror(unet)
        self._looks = any(gate.kind == SIGHT for edit in edits for gate in edit.gates)
        self._attachment = Attachment(self.mirror, sort_edits(edits), ours=False)  # type: ignore[arg-type]
        self._attachment.remove()
        self.begin()

    def begin(self) -> None:
        """What is drawn next is another picture: `lines` counts from here on."""
        self._start = self.receipt.calls, {name: one.open for name, one in self.receipt.by_name.items()}

    def lines(self) -> list[str]:
        """What each erasure did since `begin`, a line each."""
        calls, opened = self._start
        calls, tallies, told = self.receipt.calls - calls, self.receipt.by_name, []
        for erasure, strength in self.erasures:
            names = [edit.scaled(strength).name for edit in erasure.edits if strength]
            rows = max((tallies[name].open - opened.get(name, 0) for name in names), default=0)
            fired = f"erased in {rows} rows" if rows else "nothing to erase"
            what = f"{erasure.header.title} ({strength:g}, {erasure.digest[:12]})"
            told.append(f"{what}: {fired}, {calls} calls")
        return told

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self._attachment.edits

    @property
    def receipt(self) -> Receipt:
        return self._attachment.receipt

    def foreign(self) -> list[str]:
        """Titles of the erasures that were made and measured on another checkpoint."""
        mark = identity.digest(sorted(self.mirror.names()))
        return [one.header.title for one, _ in self.erasures
                if one.header.base.fingerprint.get("attn2", mark) != mark]

    @contextmanager
    def acting(
        self, unconditional: Sequence[bool] = (), control: object = None, leads: bool = False
    ) -> Iterator[None]:
        """One UNet call with the edits; raises unless every one of them was accounted for in it.

        `unconditional` says of each row, or of each equal part of the rows, whether it is that; `leads`
        whether guidance leads away from these.
        """
        if self._looks and control is not None:
            raise RefusedError("a gate that looks at the picture cannot be used with a ControlNet here", "")
        calls = self.receipt.calls
        if self._attend:
            for module in self.mirror.cross:
                module.forward = partial(_attention, module)
        handles = [self.mirror.unet.register_forward_pre_hook(_named, with_kwargs=True)]
        handles += [m.register_forward_pre_hook(_towards, with_kwargs=True) for m in self.mirror.cross]
        try:
            self._attachment.restore()
            handles += [m.register_forward_pre_hook(_back, with_kwargs=True) for m in self.mirror.cross]
            with _told(unconditional, leads):
                yield
        finally:
            self._attachment.remove()
            for handle in handles:
                handle.remove()
            for module in self.mirror.cross if self._attend else ():
                del module.forward
        if self.edits and self.receipt.calls == calls:
            raise SilentEditError("the UNet was not run with the edits", STRIPPED)


@contextmanager
def _told(unconditional: Sequence[bool], leads: bool) -> Iterator[None]:
    """Says which rows are conditional, where it is as in diffusers: the unconditional ones first, if any."""
    if list(unconditional) not in ([True, False], [False], [True]):
        yield
        return
    with Guidance(lambda rows: rows * sum(unconditional) // len(unconditional), lambda: leads).told():
        yield


# between the original code's arguments and diffusers'


def _named(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The text under diffusers' name, too; the original UNets pass over what they do not know."""
    context = args[2] if len(args) > 2 else kwargs.get("context")
    if not isinstance(context, Tensor):
        raise RefusedError("the UNet was given no text states that an erasure could read", "")
    return args, kwargs | {"encoder_hidden_states": context}


def _towards(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """x, context, value, mask -> x, encoder_hidden_states, attention_mask and the value aside."""
    named = dict(zip(("x", "context", "value", "mask"), args, strict=False)) | kwargs
    x, context, mask = named.pop("x"), named.pop("context", None), named.pop("mask", None)
    return (x,), {**named, "encoder_hidden_states": context, "attention_mask": mask}


def _back(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The other way; a value of its own gets as many empty rows as the text got."""
    kwargs = dict(kwargs)
    context, mask = kwargs.pop("encoder_hidden_states"), kwargs.pop("attention_mask", None)
    value = kwargs.get("value")
    if value is not None and value.shape[1] < context.shape[1]:
        extra = context.shape[1] - value.shape[1]
        kwargs["value"] = cat([value, value.new_zeros(len(value), extra, value.shape[2])], 1)
    if mask is not None:
        kwargs["mask"] = mask
    return args, kwargs | {"context": context}


def _attention(
    module: Any, x: Tensor, context: Tensor, value: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T + mask) v of x [rows, pixels, d] over the text [rows, length, width]."""
    if mask is None and value is None:
        return type(module).forward(module, x, context=context)
    parts = module.to_q(x), module.to_k(context), module.to_v(context if value is None else value)
    q, k, v = (part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in parts)
    found = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None].to(q))
    return module.to_out(found.transpose(1, 2).flatten(2))
