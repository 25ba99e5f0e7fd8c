"""Gates that look at the picture: linear probes on what some modules of the UNet make of each row.

score = q(t) . u - offset(t), u the mean of a module's output over all positions, at unit length,
those of several modules side by side; offset is linear between the gate's times and constant beyond
them, and so is q between its knots, which are the times where a gate has none; whole numbers in q are
multiplied by their scale. Of several probes the highest score counts. Where it is above the threshold the
gate opens, in that very call, which is then made again under the edits behind it; and it stays open for
that row until its denoising run is over. So the text may be anything: what counts is what the UNet is
about to draw.

A gate with an offset for rows that are `alone` reads pairs: behind u of a conditional row stands that of
the unconditional row of its picture, which the prompt cannot mislead. A negative prompt can, so the
conditional row is read alone, too, with the same behind it again; so is every row where nobody says which
are unconditional, or none is, and that tells less than pairs do. Where the text itself opens one of the
gates that are `told` it, a pair is watched closer, by the offset that is `eased`.

A run of a row is over when its timestep rises, or when the pipeline that the edits were applied to is called
anew. Rows of equal latents are one picture (the
halves of a classifier-free batch): what is seen in one of them opens all. Runs of different threads
are kept apart. A call of a training or of a self-test is a run of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conceptzap.edit import Gate
from conceptzap.errors import MismatchError, SilentEditError
from conceptzap.runtime.gates import SLOPE, hard

OFFSETS = ("offset", "eased", "alone")  # of any row; where a text is told; without an unconditional row
SKIPPED = "something replaced or bypassed the module; undo it and attach again"
SEEN: ContextVar[list[Tensor] | None] = ContextVar("seen", default=None)


@contextmanager
def margins_seen() -> Iterator[list[Tensor]]:
    """Inside the block every reading appends its margins [gates, rows], above 0 open; gradients flow.

    Where a gate does not look, its margin is -inf.
    """
    found: list[Tensor] = []
    token = SEEN.set(found)
    try:
        yield found
    finally:
        SEEN.reset(token)


def check(gate: Gate) -> None:
    """Raise `MismatchError` unless the probes have rising times, a query and an offset each."""
    times, query, offset = (gate.tensors[slot] for slot in ("times", "query", "offset"))
    knots = gate.tensors.get("knots", times)
    offsets = [gate.tensors.get(slot, offset) for slot in OFFSETS]
    rising = all(one.ndim == 1 and len(one) and bool((one.diff() > 0).all()) for one in (times, knots))
    sound = rising and query.ndim in (2, 3) and query.numel() > 0
    shape = (len(times), *query.shape[1:-1])
    scaled = "scale" not in gate.tensors or gate.tensors["scale"].shape == query.shape[:-1]
    fits = sound and scaled and len(query) == len(knots) and all(one.shape == shape for one in offsets)
    named = all(isinstance(name, str) for name in gate.params.get("told", ()))
    if not (fits and named):
        raise MismatchError(
            "a 'sight' gate needs one or more rising times with one query and one offset each",
            "make the erasure again",
        )


def pooled(output: Tensor | tuple) -> Tensor:
    """What a module put out, averaged over positions, at unit length, fp32: [rows, channels].

    Outputs are [rows, channels, h, w] or [rows, positions, channels]; of a tuple, the first.
    """
    output = output[0] if isinstance(output, tuple) else output
    mean = output.float().flatten(2).mean(2) if output.ndim == 4 else output.float().mean(1)
    return normalize(mean, dim=-1)


def paired(gate: Gate, seen: Tensor, times: Tensor, told: Tensor | None, half: int) -> Tensor:
    """`scores` of a gate that reads pairs, for rows [rows, channels]: the higher of those alone and in pairs.

    The first `half` rows are the unconditional ones of the pictures of the others, and not read by
    themselves; 0: there are no pairs.
    """
    if not half:
        lone = torch.ones(len(seen), dtype=torch.bool)
        return scores(gate, torch.cat([seen, seen], -1), times, told, lone)
    given = seen[half:]
    both = torch.cat([torch.cat([given, given], -1), torch.cat([given, seen[:half]], -1)])
    told = None if told is None else told[half:].repeat(2)
    found = scores(gate, both, times[half:].repeat(2), told, torch.arange(2 * half) < half)
    return torch.cat([seen.new_full((half,), -torch.inf), found.view(2, half).amax(0)])


def between(asked: Tensor, times: Tensor, values: Tensor) -> Tensor:
    """Rows of `values` [k, ...] at `asked` [n], linear between the rising times [k]: [n, ...]."""
    right = torch.searchsorted(times, asked.contiguous()).clamp(max=len(times) - 1)
    left = (right - 1).clamp(min=0)
    part = ((asked - times[left]) / (times[right] - times[left]).clamp(min=1e-6)).clamp(0, 1)
    part = part.view(-1, *(1,) * (values.ndim - 1))
    return values[left] + part * (values[right] - values[left])


def scores(
    gate: Gate, seen: Tensor, times: Tensor, told: Tensor | None = None, alone: Tensor | None = None
) -> Tensor:
    """What a gate compares with its threshold, for `pooled` activations [rows, channels]: [rows].

    `told` [rows]: which rows' texts the gate is told to watch closer; None: no row's. `alone`
    [rows]: which of the pairs, if it reads pairs, are a row and itself; None: none.
    """
    query = gate.tensors["query"].float()
    if "scale" in gate.tensors:
        query = query * gate.tensors["scale"].float()[..., None]
    if seen.shape[-1] != query.shape[-1]:
        raise MismatchError(
            f"a 'sight' gate reads {query.shape[-1]} channels, of {' and '.join(gate.modules)} it is given "
            f"{seen.shape[-1]}",
            "the erasure was made for another architecture",
        )
    times = times[:1] if bool((times == times[0]).all()) else times  # a sampler's rows are all at one step
    known = gate.tensors["times"].float()
    knots = gate.tensors.get("knots", known).float()
    q = between(times, knots, query.view(len(query), -1, query.shape[-1]))  # [rows, probes, channels]
    far = None
    for slot, rows in zip(OFFSETS, (None, told, alone), strict=True):
        if slot in gate.tensors and (far is None or (rows is not None and bool(rows.any()))):
            offset = between(times, known, gate.tensors[slot].float().view(len(known), -1))  # [rows, probes]
            far = offset if far is None else torch.where(rows.to(offset.device)[:, None], offset, far)
    return ((q.to(seen.device) * seen[:, None]).sum(-1) - far.to(seen.device)).amax(-1)


@dataclass
class Run:
    """Where the rows of a thread's calls are: their latest timesteps [rows], what is open [gates, rows]."""

    times: Tensor
    opened: Tensor


class Sight:
    """The `sight` gates of an attachment: what they read in this call, and what is open."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self.gates = tuple(gates)
        self.sites = tuple(dict.fromkeys(path for gate in gates for path in gate.modules))
        self._low = torch.tensor([[float(gate.params.get("low", 0))] for gate in gates])  # [gates, 1]
        self._thresholds = [gate.params["threshold"] for gate in gates]
        self._runs: dict[int, Run] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._sample: Tensor | None = None
        self._half = 0  # so many rows are unconditional, each of a picture of those that follow
        self.looking = False
        self.factors = torch.zeros(len(self.gates), 0)  # [gates, rows] on the CPU

    def new_run(self) -> None:
        """What this thread draws next is another picture."""
        self._runs.pop(get_ident(), None)

    def begin(self, times: Tensor, sample: Tensor, below: int) -> None:
        """A call at timesteps [rows] (on the CPU) for latents [rows, c, h, w].

        The first `below` rows are unconditional; 0 where nobody said so.
        """
        run = self._runs[get_ident()] = Run(times, self._still_open(times))
        self._sample, self._outputs = sample, {}
        self._half = below if 2 * below == len(times) else 0
        self.factors = run.opened.float()
        self.looking = bool(self._reads().any())

    def _still_open(self, times: Tensor) -> Tensor:
        """What earlier calls of the same pictures opened, [gates, rows]; a timestep that rises begins anew.

        Another number of rows where none rises is the same pictures in another order, with guidance
        switched off midway, say. Nobody says which is which, so what is open is open for all; also where
        pictures of a single step follow each other in batches of other sizes and nobody calls `new_run`.
        """
        run = self._runs.get(get_ident())
        if run is not None and len(run.times) == len(times):
            return run.opened & (times <= run.times)
        if run is not None and bool(times.max() <= run.times.max()):
            return run.opened.any(1, keepdim=True).repeat(1, len(times))
        return torch.zeros(len(self.gates), len(times), dtype=torch.bool)

    def see(self, site: str, output: Tensor | tuple) -> None:
        """Rows of what a module put out in this call; a module may give them in parts."""
        if not self.looking:
            return
        attacked = bool(SLOPE.get()) or SEEN.get() is not None
        with torch.set_grad_enabled(attacked and torch.is_grad_enabled()):
            self._outputs.setdefault(site, []).append(pooled(output))

    def decide(self, told: Tensor) -> bool:
        """Open what the call has shown; whether anything opened. One decision a call.

        `told` [gates, rows]: where a text says what to watch for.
        """
        if not self.looking:
            return False
        self.looking = False
        run, margins = self._runs[get_ident()], self._margins(told)
        now = hard(margins).cpu() * self._reads()  # [gates, rows]
        fresh = self._alike(now.detach() > 0) & ~run.opened
        self.factors = torch.where(run.opened | (fresh & (now == 0)), 1.0, now)
        run.opened = run.opened | fresh
        return bool(fresh.any())

    def _reads(self) -> Tensor:
        """Which gates are still shut and look at these timesteps, [gates, rows]."""
        run = self._runs[get_ident()]
        return ~run.opened & (run.times >= self._low)

    def _margins(self, told: Tensor) -> Tensor:
        """How far above its threshold each gate is, [gates, rows]."""
        seen = {site: torch.cat(parts) for site, parts in self._outputs.items()}
        self._outputs, times = {}, self._runs[get_ident()].times
        for site in self.sites:
            if len(seen.get(site, ())) != len(times):
                raise SilentEditError(f"{site} did not run, so no gate could look at the picture", SKIPPED)
        found = []
        for gate, threshold, rows in zip(self.gates, self._thresholds, told, strict=True):
            each = torch.cat([seen[path] for path in gate.modules], -1)  # [rows, channels]
            pairs = "alone" in gate.tensors
            score = paired(gate, each, times, rows, self._half) if pairs else scores(gate, each, times, rows)
            found.append(score - threshold)
        margins = torch.stack(found)  # [gates, rows]
        if (asked := SEEN.get()) is not None:
            asked.append(margins.masked_fill(~self._reads().to(margins.device), -torch.inf))
        return margins

    def _alike(self, opened: Tensor) -> Tensor:
        """Opened [gates, rows], spread over the rows whose latents are the same: they are one picture."""
        sample, sources = self._sample, opened.any(0).nonzero()[:, 0].tolist()
        if sample is None or not sources:
            return opened
        spread = opened.clone()
        for row in sources:
            same = (sample == sample[row]).flatten(1).all(1).cpu()  # [rows]
            spread |= opened[:, row, None] & same
        return spread
