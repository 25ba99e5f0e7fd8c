"""Learn and calibrate the `match` gate: does a row's text speak of the concept?

A few directions in text space whose largest projection over all positions is high for prompts of
the concept and low for everything else (a max-pooled linear detector, as in CGCE and CPE's gate).
Half of the prompts fit it, the other half sets the threshold and gives both error rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Gate, Json
from conceptzap.result import wilson
from conceptzap.runtime.gates import scores

CHUNK = 64
SYNONYM = 0.85  # cosine of centred text vectors; high, for a neighbour taken for a synonym is lost
CONTEXTS = ("{}", "a photo of a {}", "a painting of a {}", "a painting of a cat in the style of {}")
MARGIN = 1e-3  # rounding of the scores in half precision and in other batches
SAFETY = 0.35  # where between the two classes the threshold stands; low opens rather than leaks


@torch.no_grad()
def states(base: Base, prompts: Sequence[str]) -> Tensor:
    """Text states of many prompts, [n, length, width] fp32."""
    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    return torch.cat([base.encode(chunk).states.float() for chunk in chunks])


def word_vectors(base: Base, words: Sequence[str]) -> Tensor:
    """A unit vector a word: its states behind the last word in a few contexts, centred over the words."""
    total: Tensor | float = 0.0
    for context in CONTEXTS:
        tail = states(base, [context.format(word) for word in words])[:, 12:].mean(1)
        unit = F.normalize(tail, dim=-1)
        total = total + F.normalize(unit - unit.mean(0), dim=-1)
    return F.normalize(total, dim=-1)


def neighbours(base: Base, concept: str, words: Sequence[str]) -> list[tuple[str, float]]:
    """The words by text cosine to the concept, nearest first."""
    words = [word for word in dict.fromkeys(words) if word.lower() != concept.lower()]
    vectors = word_vectors(base, [concept, *words])
    cosines = (vectors[1:] @ vectors[0]).tolist()
    return sorted(zip(words, cosines, strict=True), key=lambda pair: (-pair[1], pair[0]))


def _fit(open_: Tensor, shut: Tensor, seed: int, directions: int, steps: int = 150) -> Gate:
    """Logistic regression on the max-pooled score; `open_` and `shut` are unit states [n, length, d]."""
    generator = torch.Generator().manual_seed(seed)
    mean = shut.mean((0, 1))
    toward = F.normalize(open_.mean((0, 1)) - mean, dim=0)
    noise = torch.randn(directions, len(mean), generator=generator) / len(mean) ** 0.5
    query = (toward + 0.3 * noise.to(toward)).mul(8).requires_grad_()
    offset = torch.zeros((), device=mean.device, requires_grad=True)
    adam = torch.optim.Adam([query, offset], lr=0.3, foreach=False)
    with torch.enable_grad():
        for _ in range(steps):
            yes, no = (_pooled(group - mean, query) - offset for group in (open_, shut))
            hardest = no.topk(max(1, len(no) // 8)).values
            loss = F.softplus(-yes).mean() + F.softplus(no).mean() + F.softplus(hardest).mean()
            adam.zero_grad()
            (loss + 1e-4 * query.pow(2).sum()).backward()
            adam.step()
    return Gate("match", {}, {"query": query.detach().cpu(), "mean": mean.cpu()})


def _pooled(centred: Tensor, query: Tensor) -> Tensor:
    return (centred @ query.T).amax((1, 2))


def _rate(wrong: Tensor) -> dict[str, Json]:
    k, n = int(wrong.sum()), len(wrong)
    low, high = wilson(k, n)
    return {"rate": round(k / max(n, 1), 6), "low": round(low, 6), "high": round(high, 6), "n": n}


@torch.no_grad()
def fit_gate(
    base: Base,
    concept_prompts: Sequence[str],
    other_prompts: Sequence[str],
    seed: int,
    directions: int = 4,
) -> Gate:
    """A calibrated `match` gate; its params hold the threshold and both error rates with intervals.

    The threshold stands between the classes, and where they overlap below every prompt of the
    concept: a gate that opens too often costs pictures, one that stays shut lets the concept through.
    """
    yes, no = states(base, concept_prompts), states(base, other_prompts)
    halves = [F.normalize(group[::2], dim=-1) for group in (yes, no)]
    gate = _fit(*halves, seed, directions)
    asked, others = (scores(gate, group).amax(1) for group in (yes, no))
    opened, shut = asked[1::2], others[1::2]
    top, bottom = shut.max().item(), opened.min().item()
    between = top + SAFETY * (bottom - top)
    threshold = round(min(between, asked.min().item() - MARGIN), 6)
    params = {
        "threshold": threshold,
        "false_open": _rate(shut > threshold),
        "false_shut": _rate(opened <= threshold),
    }
    return Gate("match", params, gate.tensors)
