"""Learn and calibrate the `match` gate: does a row's text speak of the concept?

A few directions in text space whose largest projection over all positions is high for prompts of
the concept and low for everything else (a max-pooled linear detector, as in CGCE and CPE's gate).
Half of the prompts, drawn by lot, fit it, the other half sets the threshold and gives both error rates.

Contract: a prompt of the concept counts by its own tokens alone, start to end of text, so that the
gate opens for embeddings handed in without padding; any other prompt by every position. With two
text encoders each has directions of its own, scaled to one threshold, so that a concept named in one
of two prompts is enough. The threshold is set on the tensors as they are stored, in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptzap.edit import Gate, Json
from conceptzap.report import Report
from conceptzap.result import wilson
from conceptzap.runtime import gates
from conceptzap.training.states import States

STEPS = 150  # of Adam
STRIDE = 8  # of the padding positions that fitting looks at; the threshold looks at all
MARGIN = 1e-3  # rounding of the scores in half precision and in other batches, of the threshold
RAMP = 0.05  # of the score that a soft gate is full at: what it takes from shut to full, at least
FINER = (1, 2)  # times as many directions, where fewer leave what stays close to the concept
NARROW = 0.25  # of the concept's lowest score: a gap below it is close
SAFETY = 0.35  # where between the two classes the threshold stands; low opens rather than leaks


def fit_gate(
    states: States,
    concept_prompts: Sequence[str],
    other_prompts: Sequence[str],
    seed: int,
    directions: int = 2,
    report: Report | None = None,
) -> Gate:
    """A calibrated `match` gate; its params hold the threshold and both error rates with intervals.

    The threshold stands between the classes, and where they overlap below every prompt of the
    concept: a gate that opens too often costs pictures, one that stays shut lets the concept through.
    Where they are close it is fitted with more `directions`, too; the one that opens for the fewest
    others is it, and of those that open for none the one with the widest gap.
    """
    # wordings come in turn, so that halves that were not drawn by lot would each lack some
    yes, no = (states.rows(_by_lot(prompts, seed)) for prompts in (concept_prompts, other_prompts))
    tried: list[tuple[Gate, float]] = []
    for times in FINER:
        tried.append(_calibrated(states, yes, no, seed, times * directions, report or Report()))
        if tried[-1][1] >= NARROW:
            break
    return min(tried, key=lambda one: (opens_wrongly(one[0]), -one[1]))[0]


def opens_wrongly(gate: Gate) -> float:
    """The share of prompts that stay, none of which it was fitted on, for which a gate opens: 0 to 1."""
    return gate.params["false_open"]["rate"]


def _calibrated(
    states: States, yes: list[int], no: list[int], seed: int, directions: int, report: Report
) -> tuple[Gate, float]:
    """The gate of so many directions for each text encoder, and the gap its threshold stands in."""
    # 1. directions for each text encoder, fitted on every other prompt, scaled to the threshold 1
    queries, means = [], []
    parts = list(enumerate(states.parts))
    for number, _ in report.count(parts, len(parts), "fitting the gate"):
        query, mean = _fit(states, number, yes[::2], no[::2], seed, directions)
        own = [_scores(states, rows, number, query, mean) for rows in (yes, no)]
        threshold, *_ = _threshold(_own_tokens(states, yes, own[0]), own[1].amax(1))
        queries.append(query / threshold if threshold > 0 else query)
        means.append(mean)
    queries, means = [q.half() for q in queries], [m.half() for m in means]
    # 2. the threshold, on what is stored: every encoder alone must open, none may where it shall not
    opens, shuts = [], []
    for number, query, mean in zip(range(len(queries)), queries, means, strict=True):
        own = [_scores(states, rows, number, query.float(), mean.float()) for rows in (yes, no)]
        opens.append(_own_tokens(states, yes, own[0]))
        shuts.append(own[1].amax(1))
    threshold, gap, rates = _threshold(torch.stack(opens).amin(0), torch.stack(shuts).amax(0))
    params = {"threshold": threshold, **rates}
    if len(states.parts) > 1:
        params["parts"] = list(states.parts)
    tensors = {"query": torch.block_diag(*queries), "mean": torch.cat(means)}
    return Gate("match", params, tensors), gap


def _by_lot(prompts: Sequence[str], seed: int) -> list[str]:
    """In an order by lot; what is said twice stands together, so that it is in both halves."""
    distinct = list(dict.fromkeys(prompts))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    place = {distinct[index]: number for number, index in enumerate(order)}
    return sorted(prompts, key=place.__getitem__)


def soften(gate: Gate, states: States, yes: Sequence[str], no: Sequence[str], power: float) -> Gate:
    """The `similar` gate of a fitted `match` gate: 0 for all that shall stay, 1 for the concept.

    What lies between is as near as its score is on the way; where the two overlap, all of the concept
    counts more than what stays.
    """
    opens, shuts = (_all_scores(gate, states, prompts) for prompts in (yes, no))
    full = _own_tokens(states, states.rows(yes), opens).min().item()
    full -= MARGIN * abs(full)
    threshold = min(shuts.amax(1).max().item(), full - RAMP * abs(full))
    params = {"threshold": round(threshold, 6), "full": round(full, 6), "power": float(power)}
    if "parts" in gate.params:
        params["parts"] = gate.params["parts"]
    return Gate("similar", params, gate.tensors)


def judged(gate: Gate, states: States, prompts: Sequence[str], own: bool) -> Tensor:
    """What a gate compares with its threshold for prompts, [prompts]; by their `own` tokens or by all."""
    scores = _all_scores(gate, states, prompts)
    return _own_tokens(states, states.rows(prompts), scores) if own else scores.amax(1)


def _all_scores(gate: Gate, states: States, prompts: Sequence[str]) -> Tensor:
    """A gate's score at every position of prompts, [prompts, length]."""
    return torch.cat([gates.scores(gate, states.hidden[rows].float()) for rows in states.chunks(prompts)])


def _unit(states: States, rows: list[int], number: int, positions: Sequence[int] | slice) -> Tensor:
    """States of one text encoder at unit length, fp32 [rows, positions, d]."""
    start = sum(states.parts[:number])
    part = states.hidden[rows][:, positions, start : start + states.parts[number]]
    return F.normalize(part.float(), dim=-1)


def _fit(
    states: States, number: int, yes: list[int], no: list[int], seed: int, directions: int
) -> tuple[Tensor, Tensor]:
    """Logistic regression on the max-pooled score: query [directions, d] and mean [d]."""
    # 1. all positions of the prompts themselves and a few of the padding; one row of zeros is shut
    last = int(states.ends[[*yes, *no]].max())
    positions = [*range(last + 1), *range(last + STRIDE, states.hidden.shape[1], STRIDE)]
    open_, shut = (_unit(states, rows, number, positions) for rows in (yes, no))  # [rows, positions, d]
    own = torch.tensor(positions)[None] <= states.ends[yes][:, None]  # [yes, positions]
    mean = shut.mean((0, 1))
    # 2. begin where the ends of text differ, for these have read everything
    ends = [group[range(len(rows)), states.ends[rows]] for group, rows in ((open_, yes), (shut, no))]
    toward = F.normalize(ends[0].mean(0) - ends[1].mean(0), dim=0)
    shut = torch.cat([shut, torch.zeros_like(shut[:1])])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(directions, len(mean), generator=generator) / len(mean) ** 0.5
    query = (toward + 0.3 * noise).mul(8).requires_grad_()
    offset = torch.zeros((), requires_grad=True)
    # 3. the hardest of both count twice, for both count by their last; a prompt is its state of highest score
    open_, shut = open_ - mean, shut - mean
    adam = torch.optim.Adam([query, offset], lr=0.3, foreach=False)
    for _ in range(STEPS):
        strongest = _strongest(open_, query, own), _strongest(shut, query)
        with torch.enable_grad():
            yes, no = ((states @ query.T).amax(1) - offset for states in strongest)  # [n] each
            hardest = no.topk(max(1, len(no) // 8)).values
            weakest = yes.topk(max(1, len(yes) // 8), largest=False).values
            loss = F.softplus(-yes).mean() + F.softplus(-weakest).mean()
            loss = loss + F.softplus(no).mean() + F.softplus(hardest).mean()
            adam.zero_grad()
            (loss + 1e-4 * query.pow(2).sum()).backward()
        adam.step()
    return query.detach(), mean


@torch.no_grad()
def _strongest(states: Tensor, query: Tensor, own: Tensor | None = None) -> Tensor:
    """Of each prompt's states [n, positions, d] the one that scores highest, [n, d]; `own`: which count."""
    scores = (states @ query.T).amax(-1)  # [n, positions]
    if own is not None:
        scores = scores.masked_fill(~own, -torch.inf)
    return states[torch.arange(len(states)), scores.argmax(1)]


@torch.no_grad()
def _scores(states: States, rows: list[int], number: int, query: Tensor, mean: Tensor) -> Tensor:
    """Scores of one text encoder's directions at every position: [rows, length]; see `gates.scores`."""
    chunks = [rows[i : i + 64] for i in range(0, len(rows), 64)]
    whole = (_unit(states, chunk, number, slice(None)) - mean for chunk in chunks)
    return torch.cat([(part @ query.T).amax(-1) for part in whole])


def _own_tokens(states: States, rows: list[int], scores: Tensor) -> Tensor:
    """The largest score over each prompt's own tokens, the padding left out: [rows]."""
    padding = torch.arange(scores.shape[1])[None] > states.ends[rows][:, None]
    return scores.masked_fill(padding, -torch.inf).amax(1)


def _threshold(opens: Tensor, shuts: Tensor) -> tuple[float, float, dict[str, Json]]:
    """The threshold by the half that was not fitted on, the gap between the classes, both error rates.

    The gap is a share of the concept's lowest score, below 0 where the classes overlap.
    """
    opened, shut = opens[1::2], shuts[1::2]
    top, bottom = shut.max().item(), opened.min().item()
    between = top + SAFETY * (bottom - top)
    least = opens.min().item()
    threshold = round(min(between, least - MARGIN * abs(least)), 6)
    return threshold, (bottom - top) / max(abs(bottom), 1e-6), {
        "false_open": rate(shut > threshold),
        "false_shut": rate(opened <= threshold),
    }


def rate(wrong: Tensor) -> dict[str, Json]:
    """The share of what is wrong [n], with its interval, as a gate's params have it."""
    k, n = int(wrong.sum()), len(wrong)
    low, high = wilson(k, n)
    return {"rate": round(k / max(n, 1), 6), "low": round(low, 6), "high": round(high, 6), "n": n}
