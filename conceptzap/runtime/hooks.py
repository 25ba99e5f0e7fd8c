"""Hooks on the UNet, its cross-attentions and its layers: where edits meet the activations.

Attention processors are left alone: they are replaced silently by attention slicing, xformers and
others, a hook on the module is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptzap.edit import MAX_ROWS, token_count
from conceptzap.errors import RefusedError, SilentEditError
from conceptzap.runtime import adapters, guides, ops
from conceptzap.runtime.ledger import Ledger, refuse_recording
from conceptzap.runtime.receipt import STRIPPED, Call

# the UNet's arguments in their order
ARGUMENTS = (
    "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond",
    "attention_mask", "cross_attention_kwargs", "added_cond_kwargs", "down_block_additional_residuals",
    "mid_block_additional_residual", "down_intrablock_additional_residuals", "encoder_attention_mask",
    "return_dict",
)  # fmt: skip
SIDE_DOORS = ("added_cond_kwargs", "cross_attention_kwargs")
MASK_STEP = 8  # xformers reads masks whose length is a multiple of this


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
    whole = False  # it opens and closes books, so it must hear of a failure, too
    path = ""

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        raise NotImplementedError


class UNetHook(Hook):
    """Opens and closes the books of one UNet call, and lets guides steer what it predicts.

    `heard` is told the call's text states and pooled text, which it may refuse.
    """

    writes = whole = True

    def __init__(self, ledger: Ledger, heard: Callable[[Tensor, Tensor | None], None]) -> None:
        self.ledger, self.heard = ledger, heard
        self.in_graphs = False  # some call was compiled: a graph made while hooks rest would lack them

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        refuse_recording()
        self._open(module, args, kwargs, torch.compiler.is_compiling())

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return self._close(module, output)

    # a compiler would trace the reading of gates, too, and break its graph in many places

    @torch.compiler.disable
    def _open(self, module: nn.Module, args: tuple, kwargs: dict, compiling: bool) -> None:
        self.in_graphs |= compiling
        named = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        doors = [named.get(name) or {} for name in SIDE_DOORS]
        beside = {key for door in doors for key, given in door.items() if given is not None}
        bypassed = beside & {"image_embeds", "gligen"}
        states = _text_states(None if bypassed else named.get("encoder_hidden_states"))
        if not any(owner(hook) is self for hook in module._forward_hooks.values()):
            raise SilentEditError("the hook that checks every UNet call is gone", STRIPPED)
        self.heard(states, (named.get("added_cond_kwargs") or {}).get("text_embeds"))
        self.ledger.begin(states, named["timestep"], named["sample"], None if self.in_graphs else module)
        if self.ledger.looks or self.ledger.guides:  # residuals come in lists, which the UNet empties
            self.ledger.call.given = args, _copied(kwargs)

    @torch.compiler.disable
    def _close(self, module: nn.Module, output: Any) -> Any:
        if output is None:
            self.ledger.abandon()
            return None
        args, kwargs = self.ledger.call.given
        try:
            again = self.ledger.look()
            if again:  # a gate opened on what this call showed
                output = module.forward(*args, **_copied(kwargs))
            steered = bool(self.ledger.call.among(self.ledger.guides))
            if steered:
                named = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
                moved = guides.steer(self.ledger, module, named, output[0])
                whole = type(output) is tuple
                output = (moved, *output[1:]) if whole else replace(output, sample=moved)
        except BaseException:
            self.ledger.abandon()
            raise
        self.ledger.finish()
        return output if again or steered else None


def _copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with lists of their own."""
    return {key: list(value) if isinstance(value, list) else value for key, value in kwargs.items()}


class SightHook(Hook):
    """At a module that `sight` gates look at: its output goes on as it is."""

    writes = True

    def __init__(self, ledger: Ledger, path: str) -> None:
        self.ledger, self.path = ledger, path

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.ledger.enter(self, len(args[0] if args else kwargs["hidden_states"]))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        rows = len(output[0] if isinstance(output, tuple) else output)
        self.ledger.call.leave(self, rows)
        self.ledger.sight.see(self.path, output)


class CrossHook(Hook):
    """At an `attn2`: lengthen context and mask by the learned rows of the open `tokens` edits.

    The hooks of its key and value layers write into these rows; `extra` says how many stand behind
    the text in this call.
    """

    def __init__(self, ledger: Ledger, site: Site) -> None:
        self.ledger, self.path = ledger, site.path
        self.edits = frozenset(site.edits)
        self.extra = 0

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        call = self.ledger.enter(self, len(args[0]))
        tokens, self.extra = call.among(self.edits), 0
        if not tokens:
            return None
        args = list(args)
        states = _text_states(args.pop(1) if len(args) > 1 else kwargs.get("encoder_hidden_states"))
        mask = args.pop(1) if len(args) > 1 else kwargs.get("attention_mask")
        if mask is None:
            longer = call.once(("context", tokens), states, self._lengthen)
        else:
            longer = self._lengthen(call, states, mask)
        self.extra = longer["encoder_hidden_states"].shape[1] - states.shape[1]
        return tuple(args), kwargs | longer

    def _lengthen(
        self, call: Call, states: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        tokens = call.among(self.edits)
        counts = [token_count(self.ledger.edits[index]) for index in tokens]
        rows, length, width = states.shape
        extra, strengths = sum(counts), call.table(tokens)  # [rows, edits], None where all are 1
        if extra > MAX_ROWS:
            raise RefusedError(
                f"{extra} learned tokens are open at once for one prompt, the limit is {MAX_ROWS}",
                "use fewer erasures together, or ones without learned tokens",
            )
        hidden = self._hidden(tokens, strengths)  # [rows, 1, 1], None where the text stays in sight
        if mask is not None or strengths is not None or hidden is not None:
            extra += -(length + extra) % MASK_STEP
            if strengths is None:
                strengths = torch.ones(rows, len(tokens))
            shut = strengths <= 0  # whose gradient would be NaN
            bias = strengths.masked_fill(shut, 1).log().masked_fill(shut, -torch.inf)
            bias = bias.repeat_interleave(torch.tensor(counts), 1, output_size=sum(counts))  # [rows, learned]
            bias = F.pad(bias, (0, extra - bias.shape[1]), value=-torch.inf)  # [rows, extra]
            mask = states.new_zeros(rows, 1, length) if mask is None else mask
            mask = mask if hidden is None else mask + hidden.to(mask)
            mask = torch.cat([mask, bias[:, None].to(mask)], -1)  # [rows, 1, length + extra]
        pad = states.new_zeros(rows, extra, width)
        # [rows, length + extra, width]
        return {"encoder_hidden_states": torch.cat([states, pad], 1), "attention_mask": mask}

    def _hidden(self, tokens: tuple[int, ...], strengths: Tensor | None) -> Tensor | None:
        """The bias of the text where learned rows stand in its place: log prod_i (1 - s_i), [rows, 1, 1]."""
        alone = [i for i, index in enumerate(tokens) if self.ledger.edits[index].params.get("alone")]
        if not alone:
            return None
        if strengths is None:
            return torch.full((1, 1, 1), -torch.inf)
        left = (1 - strengths[:, alone]).clamp(min=0).prod(1)  # [rows]
        gone = left <= 0  # whose gradient would be NaN
        return left.masked_fill(gone, 1).log().masked_fill(gone, -torch.inf)[:, None, None]


class Acting(NamedTuple):
    """Which edits of a layer act in a call: on its input, as learned rows, on its output.

    `written`: some of the learned rows are written into the output.
    """

    shifting: tuple[int, ...]
    thinning: tuple[int, ...]
    moving: tuple[int, ...]
    learned: tuple[int, ...]
    changing: tuple[int, ...]
    written: bool


class LayerHook(Hook):
    """At any module: changes of its input and learned rows before it, changes of its output after it.

    Inside a cross-attention with `tokens` edits it works for its hook (`cross`) as key or value
    layer (`letter`).
    """

    def __init__(
        self, ledger: Ledger, site: Site, cross: CrossHook | None = None, letter: str = ""
    ) -> None:
        self.ledger, self.path, self.cross, self.letter = ledger, site.path, cross, letter
        self.of_text = site.path.endswith((".attn2.to_k", ".attn2.to_v"))
        edits = ledger.edits
        self.shifting = frozenset(index for index in site.edits if ops.shifts_input(edits[index]))
        self.pairs = frozenset(index for index in site.edits if ops.is_low_rank(edits[index]))
        self.masks = frozenset(index for index in site.edits if ops.is_mask(edits[index]))
        self.thinning = frozenset(index for index in site.edits if ops.thins(edits[index]))
        self.moving = frozenset(index for index in site.edits if adapters.writes_input(edits[index]))
        before = self.shifting | self.thinning | self.moving
        self.others = frozenset(site.edits) - before - self.pairs - self.masks
        self.changing = self.pairs | self.masks | self.others
        self.learned = cross.edits if cross else frozenset()
        written = any(f"tokens_{letter}" in edits[index].tensors for index in self.learned)
        self.writes = bool(self.changing) or written
        self.text: Tensor | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        x = adapters.given(self.path, args, kwargs)
        call = self.ledger.enter(self, len(x))
        if call.idle:
            return None
        acting = self._acting(call)
        self.text = self._text(x) if acting.changing or acting.written else None
        if not (acting.shifting or acting.thinning or acting.moving or acting.learned):
            return None
        key = (self.letter, acting.shifting, acting.thinning, "beside", acting.learned)
        once = self.of_text and not acting.moving
        new = call.once(key, x, self._input) if once else self._input(call, x, module)
        return adapters.regiven(args, kwargs, new)

    def _acting(self, call: Call) -> Acting:
        """Looked up once for as long as the gates say the same."""

        def make() -> Acting:
            groups = (self.shifting, self.thinning, self.moving, self.learned, self.changing)
            found = [call.among(group) for group in groups]
            name = f"tokens_{self.letter}"
            return Acting(*found, any(name in self.ledger.edits[index].tensors for index in found[3]))

        return call.reading.once(("acting", self.path), make)

    def _text(self, x: Tensor) -> Tensor:
        """x without the rows that stand in it for the learned ones."""
        extra = self.cross.extra if self.cross else 0
        return x[:, : x.shape[1] - extra] if extra else x

    def _input(self, call: Call, x: Tensor, module: nn.Module | None = None) -> Tensor:
        text = self._text(x)  # [rows, length, width]
        total = self._thinned(call, text)
        if shifting := call.among(self.shifting):
            total = total + self._low_rank(call, shifting, "into", None, text)
        for index in call.among(self.moving):
            total = total + self._adapted(call, index, module, text, None)
        if not (learned := call.among(self.learned)):
            return total
        rows = [self._prompt(call, index, x) for index in learned]
        spare = x.shape[1] - text.shape[1] - sum(row.shape[1] for row in rows)
        if spare < 0:
            path = self.cross.path
            raise SilentEditError(f"{path} has no place for the learned tokens", STRIPPED)
        # [rows, length + learned + spare, width]
        return torch.cat([total, *rows, x.new_zeros(len(x), spare, x.shape[2])], 1)

    def _thinned(self, call: Call, x: Tensor) -> Tensor:
        """x without the features that open masks cut."""
        if not (thinning := call.among(self.thinning)):
            return x
        return ops.thinned([self.ledger.parts[index] for index in thinning], call.strength(thinning, x), x)

    def _prompt(self, call: Call, index: int, x: Tensor) -> Tensor:
        """An edit's learned rows in context space, [rows, n, width]; zeros where they are shut.

        Those in key or value space are written after the projection; here they are zeros, too.
        """
        part = self.ledger.parts[index]
        for name in (f"prompt_{self.letter}", "prompt"):
            if name in part.edit.tensors:
                rows = part.slot(name, x).expand(len(x), -1, -1)
                return self._where_open(call, index, ops.in_halves(part, rows, call.leading, call.rows))
        return x.new_zeros(len(x), token_count(part.edit), x.shape[2])

    def _where_open(self, call: Call, index: int, rows: Tensor) -> Tensor:
        """Zeros in shut rows: a key that overflows must not meet their mask of -inf, as NaN."""
        strength = call.strength((index,), rows)
        return rows if strength is None else torch.where(strength[..., None] == 0, 0, rows)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, text, self.text, whole = self.ledger.call, self.text, None, output
        output = adapters.made(self.path, whole)
        call.leave(self, len(output))
        if call.idle:
            return None
        acting = self._acting(call)
        if not acting.changing and not acting.written:
            return None
        length = text.shape[1] if acting.learned else None
        total = output[:, :length] if acting.learned else output  # [rows, length, out]
        if acting.changing:
            total = total + self._change(call, module, text, total)
        if not acting.learned:
            return adapters.remade(whole, total)
        return torch.cat([total, *self._rows(call, acting.learned, output, length)], 1)

    def _change(self, call: Call, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What the open edits add to the output y for x: pairs as one, masks as one, others in turn.

        A layer's own y is made anew where others have moved its input; a module of several parts has
        only the one that they made.
        """
        others = call.among(self.others)
        moved = any(map(call.among, (self.shifting, self.thinning, self.moving)))
        readers = any(adapters.reads_output(self.ledger.edits[index]) for index in others)
        if moved and readers and not any(module.children()):
            y = module.forward(x)
        changes = []
        if pairs := call.among(self.pairs):
            changes.append(self._low_rank(call, pairs, "up", module, x))
        if masks := call.among(self.masks):
            parts = [self.ledger.parts[index] for index in masks]
            # what features are cut is cut for these masks, too: masks multiply
            changes.append(ops.masked(parts, call.distinct(masks), module, self._thinned(call, x)))
        for index in others:
            if adapters.is_adapter(self.ledger.edits[index]):
                changes.append(self._adapted(call, index, module, x, y))
            else:
                changes.append(self._weighed(call, index, ops.dense(self.ledger.parts[index], module, x)))
        return sum(changes[1:], changes[0])

    def _adapted(self, call: Call, index: int, module: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        """What an adapter adds to the output y or, where there is none yet, to the input x."""
        part = self.ledger.parts[index]
        return self._weighed(call, index, adapters.change(part, self.path, module, x, y, call.times))

    def _weighed(self, call: Call, index: int, change: Tensor) -> Tensor:
        strength = call.strength((index,), change)
        return ops.weigh(None if strength is None else strength[..., 0], change)

    def _low_rank(
        self, call: Call, indices: tuple[int, ...], up: str, module: nn.Module | None, x: Tensor
    ) -> Tensor:
        pair = self.ledger.pair(indices, up, x)
        return ops.low_rank(pair, call.strength(indices, x, pair.ranks), module, x)

    def _rows(self, call: Call, learned: tuple[int, ...], output: Tensor, start: int) -> Iterator[Tensor]:
        """What stands behind the text in the output: [rows, n, out] of each edit, then what is spare."""
        for index in learned:
            part, name = self.ledger.parts[index], f"tokens_{self.letter}"
            stop = start + token_count(part.edit)
            if name in part.edit.tensors:
                own = part.slot(name, output).expand(len(output), -1, -1)
                yield self._where_open(call, index, own)
            else:
                yield output[:, start:stop]
            start = stop
        yield output[:, start:]


def _text_states(states: Any) -> Tensor:
    if isinstance(states, Tensor):
        return states
    raise RefusedError(
        "the UNet was given no text states that an erasure could read, or something beside them",
        "image prompts (IP-Adapter) and grounding (GLIGEN) bring what no erasure covers; unload them",
    )
