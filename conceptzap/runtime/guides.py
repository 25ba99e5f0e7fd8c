"""Guides: edits that steer classifier-free guidance itself, by what the UNet sees under texts of their own.

Guidance makes u + w (c - u) of what the UNet predicts with the prompt, c, and without it, u (Ho and
Salimans 2022). A guide moves c and nothing else:

`safe`  c - m, m = mu (s - u) + momentum, away from a text s (Schramowski et al. 2023, eq. 3 to 8).
`swap`  c - f + g: the guidance towards f becomes the guidance towards g, u stays.

So the estimate is steered whatever w is and whoever computes that line; without guidance it is the
moved c itself. The texts go through the plain base in a call beside the main one, whose own rows they
cannot disturb; what each guide adds is computed from the unmoved c, so several guides add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Gate
from conceptzap.errors import MismatchError, RefusedError
from conceptzap.runtime.ops import Part, weigh

if TYPE_CHECKING:
    from conceptzap.runtime.gates import Strengths
    from conceptzap.runtime.ledger import Ledger

SITE = "unet"  # a guide acts on what the UNet as a whole predicts
CONDITIONAL = "conditional"
GUIDANCE: ContextVar[Guidance | None] = ContextVar("guidance", default=None)
BESIDE: ContextVar[bool] = ContextVar("beside", default=False)  # a call of the UNet for a guide's own texts


# which rows are conditional


class Guidance:
    """One way from noise to pictures: how the rows of its UNet calls are ordered, what guides remember.

    `below` is asked at every call: of its rows, how many are unconditional. They come first. So is `leads`:
    whether pictures are drawn away from what these show, as they are with a guidance of more than 1.
    """

    def __init__(self, below: Callable[[int], int], leads: Callable[[], bool] = lambda: True) -> None:
        self.below, self.leads = below, leads
        self.memory: dict[str, Tensor] = {}  # guide -> its momentum [conditional rows, c, h, w]

    @contextmanager
    def told(self) -> Iterator[None]:
        """UNet calls inside the block belong to this way."""
        token = GUIDANCE.set(self)
        try:
            yield
        finally:
            GUIDANCE.reset(token)


def conditional_only(edit: Edit) -> bool:
    """Whether an edit acts on conditional rows alone, as every guide does."""
    return edit.op == "guide" or edit.params.get("rows") == CONDITIONAL


def unconditional(rows: int, ours: bool) -> int | None:
    """How many rows of a UNet call, from the first, are unconditional; None where nobody said.

    `ours`: of calls that nobody described, each row is conditional (`Base.eps`).
    """
    if guidance := GUIDANCE.get():
        return guidance.below(rows)
    return 0 if ours else None


def leading(below: int | None) -> int:
    """How many rows of a UNet call, from the first, pictures are drawn away from; 0 where nobody said."""
    guidance = GUIDANCE.get()
    return below if below and guidance and guidance.leads() else 0


def confined(
    strengths: Strengths, only: Tensor | None, partial: Sequence[int], below: int | None
) -> Strengths:
    """Strengths where edits may act: in the rows of `only`, the `partial` ones past the unconditional rows.

    Raises `RefusedError` where nobody said which these are, unless all partial ones are shut.
    """
    if below is None and bool(strengths.levels[partial].any()):
        raise RefusedError(
            "nobody says which rows of this UNet call are conditional, and an erasure acts on these alone",
            "draw with conceptzap, or with a plain Stable Diffusion pipeline that the erasure was applied to",
        )
    here = torch.ones_like(strengths.levels) if only is None else only.clone()  # [edits, rows]
    here[partial, : below or 0] = 0
    places = {i: place * here[i].to(place)[:, None] for i, place in strengths.places.items()}
    return replace(strengths, rows=strengths.rows * here, places=places, levels=strengths.levels * here)


def in_pairs(strengths: Strengths, split: Sequence[int], below: int) -> Strengths:
    """Strengths where what is `split`, with rows for either half, acts on both rows of a picture or none.

    The row with the prompt says which. `below`: from how many rows guidance leads away; where these are not
    half of them, nothing changes.
    """
    halves = 2 * below == strengths.levels.shape[1]
    if not (split and halves and bool(strengths.levels[split].any())):
        return strengths

    def spread(table: Tensor) -> Tensor:
        table = table.clone()  # [edits, rows]
        table[split, :below] = table[split, below:]
        return table

    return replace(strengths, rows=spread(strengths.rows), levels=spread(strengths.levels))


# rules


class Seen(NamedTuple):
    """What a rule works on: predictions [n, c, h, w] of the rows that a guide is open for.

    `given` with the prompt, `without` it, `texts` under the guide's own; `t` [n]; `last` is what the
    rule remembered at the step before, zeros at the first.
    """

    given: Tensor
    without: Tensor
    texts: Sequence[Tensor]
    t: Tensor
    last: Tensor


def _safe(part: Part, seen: Seen) -> tuple[Tensor, Tensor]:
    """What SLD adds to c, and its momentum; mu is measured in noise, whatever the UNet predicts."""
    params, (unsafe, *_) = part.edit.params, seen.texts
    apart = seen.given - unsafe
    if "signal" in part.edit.tensors:  # v_c - v_s = (eps_c - eps_s) / sqrt(alpha-bar)
        signal = part.slot("signal", apart)
        apart = signal[seen.t.round().long().clamp(0, len(signal) - 1)].view(-1, 1, 1, 1) * apart
    mu = (apart.abs() * params["guidance"]).clamp(max=1).masked_fill(apart >= params["threshold"], 0)
    away = mu * (unsafe - seen.without) + params["momentum"] * seen.last
    kept = params["beta"] * seen.last + (1 - params["beta"]) * away
    begun = (seen.t <= params["below"]).view(-1, 1, 1, 1)  # before that, momentum builds up
    return torch.where(begun, -away, 0), kept


def _swap(part: Part, seen: Seen) -> tuple[Tensor, None]:
    return seen.texts[1] - seen.texts[0], None


class Rule(NamedTuple):
    """`change(part, seen)`: what it adds to c, and what it remembers. `texts`: rows of its own.

    Of a rule that reads u the last text is the empty prompt, for calls that have no unconditional rows.
    """

    change: Callable[[Part, Seen], tuple[Tensor, Tensor | None]]
    texts: int
    reads_without: bool


RULES: dict[str, Rule] = {"safe": Rule(_safe, 2, True), "swap": Rule(_swap, 2, False)}


def guide(
    base: Base, rule: str, texts: Sequence[str], numbers: Mapping[str, float], gates: tuple[Gate, ...] = ()
) -> Edit:
    """The guide of a rule with its texts ("" for none) and the rule's own numbers (`format.schema`)."""
    conds = [base.encode([text]) if text else base.unconditional() for text in texts]
    states = {"context": Cond.cat(conds).states.float().cpu()}  # [texts, length, width]
    if conds[0].pooled is not None:
        states["pooled"] = Cond.cat(conds).pooled.float().cpu()  # [texts, width]
    if base.prediction == "v_prediction" and RULES[rule].reads_without:
        states["signal"] = base.alphas.sqrt().float().cpu()  # [times]
    return Edit("guide", (SITE,), states, {"rule": rule, **numbers}, gates)


def check(edit: Edit, unet: nn.Module) -> None:
    """Raise `MismatchError` unless a guide's texts fit the UNet, and it is one that guidance steers."""
    config = unet.config
    if edit.sites != (SITE,):
        raise MismatchError("a guide acts on the UNet as a whole", "make the erasure again")
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise MismatchError(
            "this base has its guidance inside the UNet, where no guide can steer it",
            "use an erasure of another method",
        )
    shapes = {slot: tuple(tensor.shape) for slot, tensor in edit.tensors.items()}
    count, context = RULES[edit.params["rule"]].texts, shapes["context"]
    pooled = _pooled_width(config)
    width = config.cross_attention_dim
    if len(context) != 3 or (context[0], context[2]) != (count, width) or not context[1]:
        raise MismatchError(
            f"a guide's texts are {context}, this base reads {count} of [length, {width}]",
            "the erasure was made for another architecture",
        )
    if shapes.get("pooled") != (None if pooled is None else (count, pooled)):
        raise MismatchError("a guide's pooled texts do not fit this base", "make the erasure on this base")
    if len(shapes.get("signal", (1,))) != 1 or not min(shapes.get("signal", (1,))):
        raise MismatchError("a guide's signal is no list of numbers", "make the erasure again")


def _pooled_width(config: Any) -> int | None:
    """How wide SDXL's pooled text is: what is embedded beside its six size ids; None elsewhere."""
    if getattr(config, "addition_embed_type", None) != "text_time":
        return None
    return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


# at the UNet


class Want(NamedTuple):
    """A guide's texts for the rows that it is open for: rows [n] of the call; contexts, pooled texts."""

    index: int
    rows: Tensor
    texts: list[tuple[Tensor, Tensor | None]]


def steer(ledger: Ledger, module: nn.Module, named: Mapping[str, Any], output: Tensor) -> Tensor:
    """The prediction [rows, c, h, w] of a UNet call with what its open guides add to conditional rows.

    `named` are the arguments of that call.
    """
    call, below = ledger.call, ledger.call.unconditional
    wanted = [_want(ledger, index, named) for index in call.among(ledger.guides)]
    found = _run(ledger, module, named, wanted)
    t = torch.as_tensor(named["timestep"], device=output.device).reshape(-1).expand(len(output))
    total = torch.zeros_like(output)
    for want, texts in zip(wanted, found, strict=True):
        part, rows = ledger.parts[want.index], want.rows
        rule = RULES[part.edit.params["rule"]]
        given = output[rows]  # [n, c, h, w]
        without = given if not rule.reads_without else output[rows - below] if below else texts[-1]
        last = _remembered(part.edit, output[below:])
        change, kept = rule.change(part, Seen(given, without, texts, t[rows], last[rows - below]))
        if kept is not None and (guidance := GUIDANCE.get()):
            guidance.memory[part.edit.name] = last.index_copy(0, rows - below, kept.detach().to(last))
        strength = call.strength((want.index,), output)
        total = total.index_add(0, rows, weigh(None if strength is None else strength[rows, 0], change))
        call.steered.add(want.index)
    return output + total


def _remembered(edit: Edit, like: Tensor) -> Tensor:
    guidance = GUIDANCE.get()
    last = guidance.memory.get(edit.name) if guidance else None
    return torch.zeros_like(like) if last is None or last.shape != like.shape else last.to(like)


def _want(ledger: Ledger, index: int, named: Mapping[str, Any]) -> Want:
    part, call, states = ledger.parts[index], ledger.call, named["encoder_hidden_states"]
    rule = RULES[part.edit.params["rule"]]
    context = part.slot("context", states)  # [texts, length, width]
    pooled = part.slot("pooled", states) if "pooled" in part.edit.tensors else [None] * rule.texts
    needed = rule.texts - (rule.reads_without and bool(call.unconditional))
    rows = torch.from_numpy(call.reading.levels[index]).nonzero().flatten().to(states.device)
    return Want(index, rows, [(context[i], pooled[i]) for i in range(needed)])


def _run(
    ledger: Ledger, module: nn.Module, named: Mapping[str, Any], wanted: Sequence[Want]
) -> list[list[Tensor]]:
    """What the plain base predicts for each guide's texts, [n, c, h, w] each; no more rows at once than
    the call itself had, at least two."""
    jobs = [(want.rows, *text) for want in wanted for text in want.texts]
    most = max(2, len(named["sample"]))
    done: dict[int, list[Tensor]] = {}
    for length in {context.shape[0] for _, context, _ in jobs}:
        alike = [number for number, job in enumerate(jobs) if job[1].shape[0] == length]
        rows = torch.cat([jobs[n][0] for n in alike])
        states = torch.cat([_times(jobs[n][1], len(jobs[n][0])) for n in alike])  # [rows, length, width]
        pooled = None
        if jobs[alike[0]][2] is not None:
            pooled = torch.cat([_times(jobs[n][2], len(jobs[n][0])) for n in alike])
        parts = []
        for at in range(0, len(rows), most):
            piece = slice(at, at + most)
            some = None if pooled is None else pooled[piece]
            parts.append(_plain(ledger, module, named, rows[piece], states[piece], some))
        counts = [len(jobs[n][0]) for n in alike]
        done |= dict(zip(alike, torch.cat(parts).split(counts), strict=True))
    each = iter(done[number] for number in range(len(jobs)))
    return [[next(each) for _ in want.texts] for want in wanted]


def _times(row: Tensor, n: int) -> Tensor:
    return row[None].expand(n, *row.shape)


def _plain(
    ledger: Ledger, module: nn.Module, named: Mapping[str, Any], rows: Tensor, states: Tensor, pooled: Any
) -> Tensor:
    """One call of the UNet without any edit: some of the main call's rows, under other texts."""
    own = {name: _chosen(value, rows, len(named["sample"])) for name, value in named.items()}
    own |= {"encoder_hidden_states": states, "encoder_attention_mask": None, "return_dict": False}
    if pooled is not None:
        own["added_cond_kwargs"] = {**own["added_cond_kwargs"], "text_embeds": pooled}
    with torch.set_grad_enabled(named["sample"].requires_grad and torch.is_grad_enabled()):
        if torch.is_grad_enabled() and getattr(module, "is_gradient_checkpointing", False):
            raise RefusedError(
                "a guide's texts cannot be recomputed for gradients of the latents",
                "switch gradient checkpointing off",
            )
        beside = BESIDE.set(True)
        try:
            with ledger.aside(states):
                return module.forward(**own)[0]
        finally:
            BESIDE.reset(beside)


def _chosen(value: Any, rows: Tensor, count: int) -> Any:
    """The same argument for some of the rows, wherever in it there is one thing a row."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _chosen(one, rows, count) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_chosen(one, rows, count) for one in value]
    return value
