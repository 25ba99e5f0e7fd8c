"""What an attack yields: one try at every probe, and what was found on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from conceptzap.base import Cond
from conceptzap.edit import Edit


@dataclass(frozen=True)
class Attempt:
    """One try at each of n probes; what is None stays as the probe has it.

    `form`: how it was searched for, and `variant` which of several sizes; tries of one form and
    variant count together. `prompts`: what was found, as text, to be drawn where `cond` is None and
    to be shown where it is not. `cond`: n rows, or a sequence of such, one for each step. `latents`
    [n, c, h, w]: noise, or what stands before step `first`. `known` [n, c, h, w] and `mask` [h, w]: see
    `sampler.Start`. `edits`: the attacker's own, beside the victim's. `found`: what is to be kept of it.
    `worded`: words that need not mean the concept to the base; it draws them, too, with nothing erased.
    """

    form: str = ""
    variant: str = ""
    prompts: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    cond: Cond | Sequence[Cond] | None = None
    latents: Tensor | None = None
    first: int = 0
    known: Tensor | None = None
    mask: Tensor | None = None
    edits: tuple[Edit, ...] = ()
    guidance: float | None = None
    found: Mapping[str, Tensor] = field(default_factory=dict)
    worded: bool = False

    @property
    def kind(self) -> str:
        """`transfer, 4 tokens`: what its tries are counted under."""
        return ", ".join(filter(None, (self.form, self.variant))) or "plain"
