"""Learn and calibrate the `sight` gate: does what the UNet is about to draw show the concept?

One linear probe a step, by ridge regression on the means of the outputs of the decoder's first two
blocks side by side (see `runtime.sight`), between pictures of the concept and pictures of everything
else, both on the way from noise. On the built-in checkpoint the second sees a style, from t = 700 on in
the unconditional half alone, which no prompt can mislead, but takes a house with a steeple for a house; the
first is the other way round, and together they tell both. So both halves of guidance are read side by
side, and rows by themselves with more caution (see `runtime.sight`). What tells the concept changes
little from step to step, so queries are stored at `KNOTS` times alone. Each step has a threshold of its
own: one picture that is doubtful early on must not dull the looks that come later.

Contract: `watch` draws the first steps of some prompts, or of given text states, and returns what
the blocks made of them; `fit_gate` takes what was seen with and without the concept. Thresholds stand
between the classes by scores of probes that had not seen the picture (`FOLDS` parts in turn), which
also give both error rates; and above all that must stay shut, for the text gates are there, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Gate
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import guides, sight
from conceptzap.runtime.attach import attached
from conceptzap.runtime.sampler import denoise
from conceptzap.runtime.sight import pooled
from conceptzap.training import memory
from conceptzap.training.detector import rate

SITES = ("unet.up_blocks.0", "unet.up_blocks.1")
DENOISING, LOOKED = 7, 5  # steps of a walk, and how many of them are looked at: down to t = 285
GUIDANCE = 4.0
KNOTS = 3  # times at which a file has queries; 2 let more of Van Gogh through (docs/figures.md)
ROWS = 16  # pictures watched together, where they fit
RIDGE = 0.1  # of the mean variance of a channel
FOLDS = 4
SAFETY = 0.2  # where between the two classes a step's threshold stands; attacks came close below .35
LEVELS = 127  # to either side, in which a query is stored: it is half a level off at most
MARGIN = 0.05  # above what must stay shut, at least; .2 let 12 of 16 of Van Gogh through (docs/figures.md)
ALONE = 0.15  # the same, of rows that stand alone, which probes of pairs tell less surely


@dataclass(frozen=True)
class Seen:
    """What the blocks made of n pictures on their way.

    `given` [steps, n, channels] of the rows with the prompt, `without` of the unconditional ones;
    `times` [steps], falling. `latents` [steps, n, c, h, w] before each call and, of pictures that were drawn
    to their end, `ends` [n, c, h, w], on the CPU.
    """

    given: Tensor
    without: Tensor
    times: Tensor
    latents: Tensor
    ends: Tensor | None = None

    @property
    def pairs(self) -> Tensor:
        """The rows with the prompt, behind them those without: [steps, n, 2 channels]."""
        return torch.cat([self.given, self.without], -1)

    @property
    def alone(self) -> tuple[Tensor, Tensor]:
        """Rows with the prompt and without, each behind itself: [steps, n, 2 channels] twice."""
        return torch.cat([self.given] * 2, -1), torch.cat([self.without] * 2, -1)

    def joined(self, *others: Seen) -> Seen:
        """These pictures and others that were looked at in the same steps."""
        every = (self, *others)
        parts = {
            name: torch.cat([getattr(one, name) for one in every], 1)
            for name in ("given", "without", "latents")
        }
        drawn = [one.ends for one in every if one.ends is not None]
        ends = torch.cat(drawn) if len(drawn) == len(every) else None
        return Seen(times=self.times, ends=ends, **parts)

    def rows(self, chosen: Tensor | list[int]) -> Seen:
        return Seen(self.given[:, chosen], self.without[:, chosen], self.times, self.latents[:, chosen])

    def __len__(self) -> int:
        return self.given.shape[1]


def watch(
    base: Base,
    asked: Sequence[str] | Cond,
    seed: int,
    report: Report,
    label: str,
    edits: Sequence[Edit] = (),
    ends: bool = False,
) -> Seen:
    """The first steps of prompts, or of n text states, under the edits; picture i has the noise seed + i.

    With `ends` the pictures are drawn to their end.
    """
    rows = memory.rows_that_fit(base, 2 * ROWS) // 2

    def look(chunk: slice) -> Seen:
        cond = asked[chunk] if isinstance(asked, Cond) else base.encode(list(asked[chunk]))
        return _walked(base, cond, range(seed + chunk.start, seed + chunk.stop), edits, ends)

    chunks = memory.in_chunks(len(asked), max(1, rows), look)
    parts = list(report.count(chunks, -(-len(asked) // max(1, rows)), label))
    return parts[0].joined(*parts[1:])


@contextmanager
def looking(base: Base) -> Iterator[list[Tensor]]:
    """What a gate would look at in each call of the UNet, [rows, channels], one a call; gradients flow.

    As gates do, it looks at the first run of a call alone: not at one that is made anew since another gate
    has opened, nor at what guides ask for their own texts.
    """
    outputs: list[Tensor] = []
    parts: list[Tensor] = []  # of the call that runs

    def begin(module: nn.Module, args: Any) -> None:
        parts.clear()

    def see(module: nn.Module, args: Any, output: Any) -> None:
        if len(parts) == len(SITES) or guides.BESIDE.get():
            return
        parts.append(pooled(output))
        if len(parts) == len(SITES):
            outputs.append(torch.cat(parts, -1))

    hooks = [base.unet.register_forward_pre_hook(begin)]
    hooks += [base.module(site).register_forward_hook(see) for site in SITES]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _walked(base: Base, cond: Cond, seeds: range, edits: Sequence[Edit], ends: bool) -> Seen:
    settings, uncond = Settings(steps=DENOISING, guidance=GUIDANCE), base.unconditional()
    with attached(base, edits), looking(base) as outputs:
        walk = denoise(base, cond, uncond, settings, base.noise(seeds))
        # the call of a step is made when the next one is asked for
        steps = [(t, x.cpu()) for t, x in islice(walk, None if ends else LOOKED + 1)]
    halves = torch.stack(outputs[:LOOKED]).cpu().unflatten(1, (2, -1))  # [steps, 2, n, channels]
    times = torch.tensor([t for t, _ in steps[:LOOKED]], dtype=torch.float32)
    latents = torch.stack([x for _, x in steps[:LOOKED]])
    return Seen(halves[:, 1], halves[:, 0], times, latents, steps[-1][1] if ends else None)


def fit_gate(groups: Sequence[Seen], others: Seen, gone: int = 0, told: Sequence[str] = ()) -> Gate:
    """A calibrated `sight` gate that opens where any of its probes does; its params hold both error rates.

    Each group of pictures of the concept is told from the others by a probe of its own. Groups of fewer than
    `FOLDS` pictures get none; the first, by which the rate of what it misses is judged, always does.
    The last so many of the others, `gone`, were asked for by the concept's name and are erased: where one of
    the text gates `told` by name is open, no others have to stay shut. 0: all of them do, whatever the text.
    """
    known = [groups[0], *(group for group in groups[1:] if len(group) >= FOLDS)]
    found = [_calibrated(group, others, gone) for group in known]
    rising = others.times.argsort()
    query = torch.stack([one.query for one in found], 1)
    scale = (query.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=1e-12)
    tensors = {
        "times": others.times[rising],
        "knots": _knots(others.times),
        "query": (query / scale).round().to(torch.int8),  # [knots, probes, channels]
        "scale": scale[..., 0],
        **{
            slot: torch.stack([getattr(one, slot) for one in found], 1)[rising].float()
            for slot in (sight.OFFSETS if told else ("offset", "alone"))
        },
    }
    params = {
        "site": SITES[0], "beside": list(SITES[1:]), "threshold": 0.0, "low": int(others.times.min()),
        "false_open": rate((torch.stack([one.no for one in found]) > 0).any(0)),
        "false_shut": rate(found[0].yes <= 0),
    }  # fmt: skip
    if told:
        params["told"] = list(told)
    return Gate("sight", params, tensors)


@dataclass(frozen=True)
class _Probe:
    """A query [knots, 2 channels], offsets [steps]: of pairs, where a text has named it, of rows alone.

    How far pictures that it had not seen are above it: `yes` [n] of the concept and `no` [m] of the others,
    in the step that says it most clearly.
    """

    query: Tensor
    offset: Tensor
    eased: Tensor
    alone: Tensor
    yes: Tensor
    no: Tensor


def _calibrated(concept: Seen, others: Seen, gone: int) -> _Probe:
    # 1. scores of every picture by probes that have not seen it: [steps, n of the concept or of the others]
    yes, no, alone = _held_out(concept, others)
    # 2. a threshold for each step, between the two; in the file it is part of the offset
    level, eased = _level(yes, no), _level(yes, no[:, -gone:])
    # 3. the probe, on everything
    query, offset = _fit(concept, others)
    above = [(scored - level[:, None]).amax(0) for scored in (yes, no)]
    return _Probe(query, offset + level, offset + eased, offset + _level(*alone, ALONE), *above)


def _level(yes: Tensor, no: Tensor, margin: float = MARGIN) -> Tensor:
    """Thresholds [steps] between scores [steps, n] of the concept and of what stays, above all of that."""
    bottom, top = yes.amin(1), no.amax(1)  # [steps]
    return top + (SAFETY * (bottom - top)).clamp(min=margin)


def looks(gate: Gate, seen: Seen, told: Tensor | None = None) -> Tensor:
    """How far the gate is from shut in each look at each picture: [steps, n].

    `told` [n]: whose text opens a gate that this one is told by; None: no one's.
    """
    steps = zip(seen.pairs, seen.times, strict=True)
    found = [sight.scores(gate, look, t.expand(len(look)), told) for look, t in steps]
    return torch.stack(found) - gate.params["threshold"]


def _held_out(concept: Seen, others: Seen) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Scores [steps, n] of the concept's pictures and [steps, m] of the others', each held out once.

    And the same of rows alone, of the others the higher of the two.
    """
    n, m = len(concept), len(others)
    yes, no, own, far = (torch.zeros(len(concept.times), size) for size in (n, m, n, m))
    for fold in range(FOLDS):
        i, j = torch.arange(n) % FOLDS == fold, torch.arange(m) % FOLDS == fold
        probe = concept.times, *_fit(concept.rows(~i), others.rows(~j))
        shown, rest = concept.rows(i), others.rows(j)
        yes[:, i], no[:, j] = _scores(shown.pairs, *probe), _scores(rest.pairs, *probe)
        own[:, i] = _scores(shown.alone[0], *probe)
        far[:, j] = torch.maximum(*(_scores(half, *probe) for half in rest.alone))
    return yes, no, (own, far)


def _scores(seen: Tensor, times: Tensor, query: Tensor, offset: Tensor) -> Tensor:
    """[steps, n] of activations [steps, n, 2 channels] at times [steps]."""
    query = sight.between(times, _knots(times), query)  # [steps, 2 channels]
    return torch.einsum("snc,sc->sn", seen.float(), query) - offset[:, None]


def _knots(times: Tensor) -> Tensor:
    """From the first of the times to the last, rising: [knots]."""
    return torch.linspace(float(times.min()), float(times.max()), KNOTS)


def _fit(concept: Seen, others: Seen) -> tuple[Tensor, Tensor]:
    """Queries [knots, 2 channels], offsets [steps]: 1 for the concept, -1 for others, classes weigh alike."""
    seen = torch.cat([concept.pairs, others.pairs], 1).double()  # [steps, n, 2 channels]
    wanted = torch.cat([torch.ones(len(concept)), -torch.ones(len(others))]).double()
    weight = torch.where(wanted > 0, 0.5 / len(concept), 0.5 / len(others))[:, None]
    mean = seen.mean(1, keepdim=True)
    seen = seen - mean
    # ridge regression in its dual form, for pictures are fewer than channels
    ridge = RIDGE * (weight * seen**2).sum((1, 2)) / seen.shape[-1]  # [steps]
    gram = seen @ seen.mT + ridge[:, None, None] * torch.diag(1 / weight[:, 0])  # [steps, n, n]
    query = (seen.mT @ torch.linalg.solve(gram, wanted[:, None]))[..., 0]  # [steps, 2 channels]
    # the lines between the knots that are nearest to them
    lines = sight.between(concept.times, _knots(concept.times), torch.eye(KNOTS)).double()  # [steps, knots]
    query = torch.linalg.pinv(lines) @ query
    return query.float(), (lines @ query * mean[:, 0]).sum(-1).float()
