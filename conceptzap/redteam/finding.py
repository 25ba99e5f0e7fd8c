"""Search for text states that bring a concept back, past the edits and all gates.

As textual inversion does (Gal et al. 2022), for free tokens v in place of the concept's name, begun from
words at random, with the embeddings moved by gradients through the text encoder and the erased UNet:

    min_v || eps(x_t, t, c(v); edits) - eps_base(x_t, t, c) ||^2 + w sum_g relu(margin_g + slack)

x_t the base's own latents on the way to pictures of the concept c, g all gates: the text's, and the one that
looks; w is 0 in the first rounds, which only have to draw. A search may also find for every prompt tokens of
its own, in front of it, as UnlearnDiffAtk does, or instead of all of it, as P4D does.

Or it needs no tokens: v is then the text states of an attacker who hands in embeddings, around the concept's
and kept there by projection (PGD, Madry et al. 2018), in each number no farther than twice the anchor's are.
Two kinds of states take no search: Ring-A-Bell's (Tsai et al. 2024), E(p) + eta mean(E(concept) - E(anchor));
and RECE's (Gong et al. 2024, eq. 9), what the changed projections W' of all cross-attentions best turn into
what W makes of the concept's,

    c' = (lambda I + sum W'^T W')^-1 (sum W'^T W) c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from conceptzap.base import CROSS_KV, Cond
from conceptzap.edit import Edit
from conceptzap.redteam import bell
from conceptzap.redteam.carrier import common
from conceptzap.redteam.case import ALONE, AROUND, BEFORE, DERIVED, SHIFTED, Case, Known, Search, told_by
from conceptzap.runtime import gates, ops, sight
from conceptzap.runtime.attach import attached
from conceptzap.training import probe
from conceptzap.training.carrier import Carrier, split, tables

SLACK = 0.2  # by which a gate has to be shut, for a search to be content
REACH = 2.0  # how far states move at most, in each number: times how far the anchor's are, root mean square
ALONG = (0.75, 3.0)  # eta, from the first prompt to the last
RESTORING = 0.1  # lambda, of the mean eigenvalue of sum W^T W


@dataclass(frozen=True)
class Found:
    """Text states, a row a prompt; `at` [n]: where something ends that is the same in every prompt."""

    cond: Cond
    at: Tensor | None = None


def applies(case: Case, search: Search) -> bool:
    """Whether there is anything to find: nothing is derived where no projection of the text is changed.

    Erased text encoders are asked for tokens alone: no other states than theirs are ever drawn.
    """
    if search.place in (AROUND, SHIFTED, DERIVED) and case.acting is not case.base:
        return False
    return search.place != DERIVED or bool(_projecting(case, case.lesson.prompts))


@dataclass(frozen=True)
class _Free:
    """What is searched for: where it begins, what it says for some of the prompts, how far from 0 it may be.

    `spoken(v, rows)` are text states, a row each; `at` as in `Found`.
    """

    start: Tensor
    spoken: Callable[[Tensor, Tensor], Cond]
    bound: Tensor | None = None
    at: Tensor | None = None


def find(
    case: Case, known: Known, search: Search, prompts: Sequence[str], number: int, of: int = 1
) -> Found:
    """Text states of prompts with what was found in them, in round `number` of so many."""
    if search.place == SHIFTED:
        return Found(_shifted(case, prompts))
    if search.place == DERIVED:
        return Found(_derived(case, prompts))
    return _searched(case, known, search, prompts, number, of)


def _searched(
    case: Case, known: Known, search: Search, prompts: Sequence[str], number: int, of: int
) -> Found:
    """Text gates have a straight-through gradient: where they are shut, the concept is drawn."""
    base, size, seen, gate = case.base, case.size, known.concept, known.gate
    generator = torch.Generator().manual_seed(case.report.seed * 7919 + number)
    free = _near(case, prompts) if search.place == AROUND else _tokens(case, search, prompts, generator)
    asked, v = base.encode(list(prompts)), nn.Parameter(free.start)
    adam = torch.optim.Adam([v], lr=search.lr, foreach=False, fused=False)
    label = f"attacking, round {number + 1} of {of}"
    for _ in case.report.count(range(size.steps), size.steps, label):
        rows = torch.randint(len(prompts), (size.batch,), generator=generator)
        steps = torch.randint(len(seen.times), (size.batch,), generator=generator)
        x, t = seen.latents[steps, rows].to(base.device), seen.times[steps].long()
        with torch.no_grad():
            target = base.predict(x, t, asked[rows])  # [batch, c, h, w]
        with torch.enable_grad():
            cond = free.spoken(v, rows)
            with gates.straight_through(), attached(base, case.edits), probe.looking(base) as looks:
                error = (base.predict(x, t, cond) - target).pow(2).mean()
            pairs = torch.cat([looks[0], seen.without[steps, rows].to(looks[0])], -1)  # [batch, 2 channels]
            margin = sight.scores(gate, pairs, t.float().cpu(), told_by(known.told, cond))
            margin = margin - gate.params["threshold"]
            margins = [*(gates.margins(one, cond.states) for one in case.text_gates), margin]
            loss = error + search.evade * _shutting(margins)
            adam.zero_grad()
            torch.autograd.backward(loss, inputs=[v])
        adam.step()
        if free.bound is not None:
            v.data.copy_(v.data.clamp(-free.bound, free.bound))
    with torch.no_grad():
        return Found(free.spoken(v.detach(), torch.arange(len(prompts))), free.at)


def _tokens(case: Case, search: Search, prompts: Sequence[str], generator: torch.Generator) -> _Free:
    """Embeddings of words at random, all encoders' side by side: [1 or n, free, d]."""
    base, carrier = case.base, _carrier(case, search, prompts)
    words = common(base, case.lesson.names).nonzero()[:, 0]
    joined = torch.cat(tables(base), -1)  # [vocabulary, d]
    many = len(prompts) if search.own else 1
    start = joined[words[torch.randint(len(words), (many, carrier.free), generator=generator)]]

    def spoken(v: Tensor, rows: Tensor) -> Cond:
        free = v[rows] if search.own else v.expand(len(rows), -1, -1)  # [rows, free, d]
        return carrier.rows(rows).states(split(base, free))

    return _Free(start, spoken, at=None if search.own else carrier.slots[:, -1])


def _carrier(case: Case, search: Search, prompts: Sequence[str]) -> Carrier:
    if search.place == ALONE:
        return Carrier.alone(case.acting, len(prompts), search.free)
    if search.place == BEFORE:
        return Carrier.before(case.acting, prompts, search.free)
    return Carrier.instead(case.acting, prompts, case.lesson.names, search.free)


def _near(case: Case, prompts: Sequence[str]) -> _Free:
    """A shift [n, length, width] of the concept's states, none at first."""
    cond, anchor = case.base.encode(list(prompts)), case.base.encode(case.anchors(prompts))
    widths = [encoder.config.hidden_size for encoder in case.base.text_encoders]
    away = (cond.states - anchor.states).float().split(widths, -1)
    bound = torch.cat([REACH * one.pow(2).mean().sqrt().expand(one.shape[-1]) for one in away])  # [width]

    def spoken(v: Tensor, rows: Tensor) -> Cond:
        return replace(cond[rows], states=cond.states[rows] + v[rows].to(cond.states))

    return _Free(torch.zeros_like(cond.states, dtype=torch.float32), spoken, bound)


def _shifted(case: Case, prompts: Sequence[str]) -> Cond:
    """The anchor's states, moved along the concept's direction, prompt by prompt farther."""
    every = [pair.concept for pair in case.lesson.pairs]
    along = bell.along(*(case.base.encode(list(side)) for side in (every, case.anchors(every))))
    plain = case.base.encode(case.anchors(prompts))
    eta = torch.linspace(*ALONG, len(prompts)).to(plain.states)[:, None]  # [n, 1]
    return bell.moved(plain, along, eta)


def _derived(case: Case, prompts: Sequence[str]) -> Cond:
    """What the edited projections have to be given, to make of it what they made of the concept's states.

    Pooled text stays the concept's own.
    """
    base, edits = case.base, _projecting(case, prompts)
    cond = base.encode(list(prompts))
    width = cond.states.shape[-1]
    gram, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    square = 0.0
    for site in base.sites(CROSS_KV):
        module = base.module(site)
        old = ops.original(module).detach().cpu().double()  # [inner, width]
        new = old + ops.weight_delta([edit for edit in edits if site in edit.sites], module).cpu().double()
        gram, cross, square = gram + new.T @ new, cross + new.T @ old, square + float(old.pow(2).sum())
    ridge = RESTORING * square / width * torch.eye(width, dtype=torch.float64)
    back = torch.linalg.solve(ridge + gram, cross).to(cond.states)  # [width, width]
    return replace(cond, states=cond.states @ back.T)


def _projecting(case: Case, prompts: Sequence[str]) -> list[Edit]:
    """What changes, as weights, what cross-attentions make of these texts, by which its gates are open."""
    sites, opened = set(case.base.sites(CROSS_KV)), set(case.opened(prompts))
    weights = [edit for edit in case.edits if edit.op == "weight" and not sites.isdisjoint(edit.sites)]
    reads = (*gates.TEXT, gates.SIGHT)
    return [edit for edit in weights if all(g in opened or g.kind not in reads for g in edit.gates)]


def _shutting(margins: Sequence[Tensor]) -> Tensor:
    """How far gates are from shut, mean over rows of their margins [rows], in all."""
    return sum((margin + SLACK).relu().mean() for margin in margins)
