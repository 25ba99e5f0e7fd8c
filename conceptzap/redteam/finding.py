"""Search for text states that bring a concept back, past the edits and all gates.

As textual inversion does (Gal et al. 2022), for free tokens v in place of the concept's name, begun from
words at random, with the embeddings moved by gradients through the text encoder and the erased UNet:

    min_v || eps(x_t, t, c(v); edits) - eps_base(x_t, t, c) ||^2 + w sum_g relu(margin_g + slack)

x_t the base's own latents on the way to pictures of the concept c, g all gates: the text's, and the one that
looks; w is 0 in the first rounds, which only have to draw. A search may also find for every prompt tokens of
its own, in front of it, as UnlearnDiffAtk does, or instead of all of it, as P4D does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conceptzap.base import Base, Cond
from conceptzap.redteam.carrier import common
from conceptzap.redteam.case import Case, Known, Search, told_by
from conceptzap.runtime import gates, sight
from conceptzap.runtime.attach import attached
from conceptzap.training import probe
from conceptzap.training.carrier import split, tables
from conceptzap.training.lessons import Lesson

SLACK = 0.2  # by which a gate has to be shut, for a search to be content


def find(case: Case, known: Known, search: Search, prompts: Sequence[str], number: int) -> Cond:
    """Text states, by the base that acts, of prompts with what was found in them.

    Text gates have a straight-through gradient: where they are shut, the concept is drawn.
    """
    base, size, seen, gate = case.base, case.size, known.concept, known.gate
    carrier, asked = search.carrier(case.acting, prompts, case.lesson.names), base.encode(list(prompts))
    generator = torch.Generator().manual_seed(case.report.seed * 7919 + number)
    v = nn.Parameter(_start(base, case.lesson, len(prompts) if search.own else 1, carrier.free, generator))
    adam = torch.optim.Adam([v], lr=search.lr, foreach=False, fused=False)
    label = f"attacking, round {number + 1} of {size.rounds}"
    for _ in case.report.count(range(size.steps), size.steps, label):
        rows = torch.randint(len(prompts), (size.batch,), generator=generator)
        steps = torch.randint(len(seen.times), (size.batch,), generator=generator)
        x, t = seen.latents[steps, rows].to(base.device), seen.times[steps].long()
        with torch.no_grad():
            target = base.predict(x, t, asked[rows])  # [batch, c, h, w]
        with torch.enable_grad():
            free = v[rows] if search.own else v.expand(size.batch, -1, -1)  # [batch, free, d]
            cond = carrier.rows(rows).states(split(base, free))
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
    with torch.no_grad():
        return carrier.states(split(base, v.detach().expand(len(prompts), -1, -1)))


def _start(base: Base, lesson: Lesson, n: int, free: int, generator: torch.Generator) -> Tensor:
    """Embeddings of words at random, all encoders' side by side: [n, free, d]."""
    words = common(base, lesson.names).nonzero()[:, 0]
    joined = torch.cat(tables(base), -1)  # [vocabulary, d]
    return joined[words[torch.randint(len(words), (n, free), generator=generator)]]


def _shutting(margins: Sequence[Tensor]) -> Tensor:
    """How far gates are from shut, mean over rows of their margins [rows], in all."""
    return sum((margin + SLACK).relu().mean() for margin in margins)
