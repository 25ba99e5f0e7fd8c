"""Hooks on the UNet, its cross-attentions and its layers: where edits meet the activations.

Attention processors are left alone: they are replaced silently by attention slicing, xformers and
others, a hook on the module is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.edit import Edit
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime import ops
from conceptzap.runtime.receipt import STRIPPED, Call, Ledger

# the UNet's arguments in their order
ARGUMENTS = (
    "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond",
    "attention_mask", "cross_attention_kwargs", "added_cond_kwargs",
)  # fmt: skip
SIDE_DOORS = ("added_cond_kwargs", "cross_attention_kwargs")

@dataclass
class Site:
    """One hooked module: its path and the indices of the edits that act on it."""

    path: str
    edits: list[int] = field(default_factory=list)


def owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


class Hook:
    """Seen going in by `before`; and going out by `after`, but only where it `writes` an output."""

    writes = False

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        raise NotImplementedError


class UNetHook(Hook):
    """Opens and closes the books of one UNet call."""

    writes = True

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        beside = {key for name in SIDE_DOORS for key in named.get(name) or ()}
        bypassed = beside & {"image_embeds", "gligen"}
        states = _text_states(None if bypassed else named.get("encoder_hidden_states"))
        if not any(owner(hook) is self for hook in module._forward_hooks.values()):
            raise SilentEditError("the hook that checks every UNet call is gone", STRIPPED)
        self.ledger.begin(states, named["timestep"], len(named["sample"]))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if output is None:
            self.ledger.abandon()
        else:
            self.ledger.finish()


class CrossHook(Hook):
    """At an `attn2`: lengthen context and mask by the learned rows of the open `tokens` edits."""

    def __init__(self, ledger: Ledger, site: Site) -> None:
        self.ledger, self.site = ledger, site
        self.key = ("context", *site.edits)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        call = self.ledger.enter(self.site.path, len(args[0]))
        if call.idle or not any(map(call.acts, self.site.edits)):
            return None
        args = list(args)
        states = args.pop(1) if len(args) > 1 else kwargs.get("encoder_hidden_states")
        mask = args.pop(1) if len(args) > 1 else kwargs.get("attention_mask")
        if mask is None:
            longer = call.once(self.key, _text_states(states), self._lengthen)
        else:
            longer = self._lengthen(call, _text_states(states), mask)
        return tuple(args), kwargs | longer

    def _lengthen(
        self, call: Call, states: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        tokens = [index for index in self.site.edits if call.acts(index)]
        counts = [ops.token_count(self.ledger.edits[index]) for index in tokens]
        pad = states.new_zeros(len(states), sum(counts), states.shape[2])
        if mask is not None or any(set(call.levels[index]) != {1.0} for index in tokens):
            logs = [call.strengths[index].log() for index in tokens]
            bias = [log[:, None].expand(-1, n) for log, n in zip(logs, counts, strict=True)]
            mask = states.new_zeros(len(states), 1, states.shape[1]) if mask is None else mask
            mask = torch.cat([mask, torch.cat(bias, 1)[:, None].to(mask)], -1)
        return {"encoder_hidden_states": torch.cat([states, pad], 1), "attention_mask": mask}


class LayerHook(Hook):
    """At a Linear or Conv2d: input shifts and learned rows before it, output changes after it.

    `beside` are the `tokens` edits of the cross-attention around it, as whose key or value layer
    (`letter`) it works.
    """

    def __init__(
        self, ledger: Ledger, site: Site, beside: Sequence[int] = (), letter: str = ""
    ) -> None:
        self.ledger, self.site, self.beside, self.letter = ledger, site, beside, letter
        self.of_text = site.path.endswith((".attn2.to_k", ".attn2.to_v"))
        shifts = [ops.shifts_input(ledger.edits[index]) for index in site.edits]
        self.shifting = [index for index, moves in zip(site.edits, shifts, strict=True) if moves]
        self.changing = [index for index in site.edits if index not in self.shifting]
        given = [f"tokens_{letter}" in ledger.edits[index].tensors for index in beside]
        self.writes = bool(self.changing) or any(given)
        self.key = (letter, *self.shifting, "beside", *beside)
        self.text: Tensor | None = None

    def _learned(self, call: Call) -> list[Edit]:
        return [self.ledger.edits[index] for index in self.beside if call.acts(index)]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        x = args[0]
        call = self.ledger.enter(self.site.path, len(x))
        if call.idle:
            return None
        new = call.once(self.key, x, self._input) if self.of_text else self._input(call, x)
        self.text = self._text(call, x) if self.writes else None
        return None if new is x else ((new, *args[1:]), kwargs)

    def _text(self, call: Call, x: Tensor) -> Tensor:
        """x without the rows that stand in it for the learned ones."""
        learned = self._learned(call)
        return x[:, : x.shape[1] - sum(map(ops.token_count, learned))] if learned else x

    def _input(self, call: Call, x: Tensor) -> Tensor:
        total = text = self._text(call, x)
        for index in filter(call.acts, self.shifting):
            moved = ops.shift(self.ledger.edits[index], text)
            total = total + call.strength(index, moved) * moved
        rows = [self._prompt(edit, x) for edit in self._learned(call)]
        return torch.cat([total, *rows], 1) if rows else total

    def _prompt(self, edit: Edit, x: Tensor) -> Tensor:
        """The learned rows in context space; those in K/V space are written after the projection."""
        name = f"prompt_{self.letter}"
        if name not in edit.tensors:
            return x.new_zeros(len(x), ops.token_count(edit), x.shape[2])
        return ops.slot(edit, name, x).expand(len(x), -1, -1)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        call, text, self.text = self.ledger.call, self.text, None
        call.leave(self.site.path, len(output))
        acting = [index for index in self.changing if call.acts(index)]
        learned = self._learned(call)
        written = any(f"tokens_{self.letter}" in edit.tensors for edit in learned)
        if not acting and not written:
            return None
        length = output.shape[1] - sum(map(ops.token_count, learned)) if learned else None
        total = output[:, :length] if learned else output
        base = self._unshifted(call, module, text, total, acting)
        for index in acting:
            change = ops.change(self.ledger.edits[index], module, text, base)
            total = total + call.strength(index, change) * change
        if not learned:
            return total
        return torch.cat([total, *self._rows(learned, output, length)], 1)

    def _unshifted(
        self, call: Call, module: nn.Module, text: Tensor, output: Tensor, acting: list[int]
    ) -> Tensor:
        """The module's own output, for edits that read it where others have shifted the input."""
        shifted = any(call.acts(index) for index in self.shifting)
        read = any(ops.reads_output(self.ledger.edits[index]) for index in acting)
        return module.forward(text) if shifted and read else output

    def _rows(self, learned: list[Edit], output: Tensor, start: int) -> Iterator[Tensor]:
        for edit in learned:
            stop = start + ops.token_count(edit)
            name = f"tokens_{self.letter}"
            if name in edit.tensors:
                yield ops.slot(edit, name, output).expand(len(output), -1, -1)
            else:
                yield output[:, start:stop]
            start = stop


def _text_states(states: Any) -> Tensor:
    if isinstance(states, Tensor):
        return states
    raise RefusedError(
        "the UNet was given no text states that an erasure could read, or something beside them",
        "image prompts (IP-Adapter) and grounding (GLIGEN) bring what no erasure covers; unload them",
    )
