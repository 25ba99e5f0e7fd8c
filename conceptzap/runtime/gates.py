"""Gates: a factor 0..1 on an edit, read once per UNet call from each row's text states and timestep.

`match` and `window` are hard (0 or 1, a row is in or out), `similar` and `curve` are soft, `token` is hard
per text position; `sight` looks at the picture (`sight.py`). A gate never sees the prompt's string, so
embeddings handed in directly are judged like any.

A `Panel` holds all gates of an attachment, each once however many edits share it. Its text part
(`match`, `similar`, `token`) is one matrix product over the stacked queries, done once a text; its timed part
(`window`, `curve`) is a few numbers a step, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conceptzap.edit import Edit, Gate
from conceptzap.errors import MismatchError

WHOLE = ("match", "similar")  # text gates of a whole row
TEXT = (*WHOLE, "token")
TIMED = ("window", "curve")
SIGHT = "sight"
CONTENT = (*TEXT, SIGHT)  # kinds that ask what a picture is of
SLOPE: ContextVar[float] = ContextVar("slope", default=0.0)


@contextmanager
def straight_through(slope: float = 1.0) -> Iterator[None]:
    """Inside the block text gates are as hard as ever and have a sigmoid's gradient (Bengio et al. 2013).

    For whoever attacks an erasure: a threshold by itself hides from a gradient how to shut the gate.
    """
    token = SLOPE.set(slope)
    try:
        yield
    finally:
        SLOPE.reset(token)


def margins(gate: Gate, states: Tensor) -> Tensor:
    """How far a text gate is from shutting, [rows]: above 0 it is open. Gradients flow."""
    return scores(gate, states).amax(-1) - gate.params["threshold"]


def _soft(gate: Gate, margin: Tensor) -> Tensor:
    """The factor of a `similar` gate, 0 to 1, at margins above its threshold [rows]."""
    span = gate.params["full"] - gate.params["threshold"]
    return (margin / span).clamp(0, 1) ** gate.params.get("power", 1.0)


def hard(margin: Tensor) -> Tensor:
    """1.0 where a margin is above 0, else 0.0; with the sigmoid's gradient if it is asked for."""
    hard, slope = (margin > 0).float(), SLOPE.get()
    if not (slope and margin.requires_grad):
        return hard
    soft = (slope * margin.clamp(min=-1e4)).sigmoid()  # a blank state's score is -inf
    return hard + (soft - soft.detach())  # exactly hard


@dataclass(frozen=True)
class Signal:
    """What one UNet call tells the gates: text states [rows, length, width], timesteps [rows]."""

    states: Tensor
    timesteps: Tensor


def check(gate: Gate, width: int) -> None:
    """Raise `MismatchError` unless the gate's tensors fit text states of this width, and each other."""
    shapes = {slot: tuple(tensor.shape) for slot, tensor in gate.tensors.items()}
    if gate.kind in TEXT:
        query, mean, parts = shapes["query"], shapes["mean"], gate.params.get("parts") or [width]
        sound = all(type(part) is int and part > 0 for part in parts) and sum(parts) == width
        if len(query) != 2 or query[1] != width or mean != (width,) or not sound:
            raise MismatchError(
                f"the gate {gate.kind!r} reads text states {query[-1]} wide, this base has {width}",
                "the erasure was made for another architecture",
            )
    if gate.kind == "similar" and not gate.params["full"] > gate.params["threshold"]:
        raise MismatchError("a 'similar' gate is full below its threshold", "make the erasure again")
    if gate.kind == "curve":
        times = gate.tensors["times"]
        fits = shapes["values"][:1] == shapes["times"] and len(shapes["values"]) <= 2
        sound = times.ndim == 1 and len(times) > 1 and fits
        if not (sound and bool((times.diff() > 0).all())):
            raise MismatchError(
                "a 'curve' gate needs two or more rising times with one value each",
                "make the erasure again",
            )


def check_sites(gate: Gate, sites: int) -> None:
    """Raise `MismatchError` unless a curve for each site is one for each of so many."""
    if _per_site(gate) and gate.tensors["values"].shape[1] != sites:
        have = gate.tensors["values"].shape[1]
        message = f"a 'curve' gate is for {have} sites, its edit has {sites}"
        raise MismatchError(message, "make the erasure again")


def _per_site(gate: Gate) -> bool:
    return gate.kind == "curve" and gate.tensors["values"].ndim == 2


def by_site(edits: Iterable[Edit]) -> tuple[tuple[Edit, ...], tuple[int, ...]]:
    """The edits, one with a curve for each site as one at each; and which of `edits` each of them is.

    Column i of such values is of the i-th site by name, as a file has them.
    """
    parts: list[tuple[int, Edit]] = []
    for index, edit in enumerate(edits):
        if any(map(_per_site, edit.gates)):
            for gate in edit.gates:
                check_sites(gate, len(edit.sites))
            parts += [(index, _at(edit, i, site)) for i, site in enumerate(sorted(edit.sites))]
        else:
            parts.append((index, edit))
    return tuple(edit for _, edit in parts), tuple(index for index, _ in parts)


def _at(edit: Edit, column: int, site: str) -> Edit:
    own = [
        replace(g, tensors=g.tensors | {"values": g.tensors["values"][:, column]}) if _per_site(g) else g
        for g in edit.gates
    ]
    return replace(edit, sites=(site,), gates=tuple(own))


# text


def unit(states: Tensor, parts: Sequence[int] = ()) -> Tensor:
    """States [..., width] in fp32, each of the `parts` (widths; one by default) at unit length.

    Unit length makes a score blind to prompt weighting, which only scales the states. With the
    widths of SDXL's two encoders as parts, neither can drown what the other says.
    """
    split = states.float().split(list(parts) or states.shape[-1], -1)
    return torch.cat([normalize(part, dim=-1) for part in split], -1)


class Detectors:
    """Text gates with the same `parts`, their queries stacked: [gates, most, width]."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self.parts = tuple(gates[0].params.get("parts") or ())
        most = max(len(gate.tensors["query"]) for gate in gates)
        query = torch.stack([_repeated(gate.tensors["query"].float(), most) for gate in gates])
        mean = torch.stack([gate.tensors["mean"].to(query) for gate in gates])
        self.query = query  # [gates, most, width]
        self.offset = (query * mean[:, None]).sum(-1)  # query_i . mean: [gates, most]

    def scores(self, states: Tensor) -> Tensor:
        """max_i query_i . (u(c) - mean) at every text position: [gates, rows, length].

        An all-zero state says nothing (SDXL's empty negative prompt): its score is -inf.
        """
        self.query, self.offset = self.query.to(states.device), self.offset.to(states.device)
        found = unit(states, self.parts) @ self.query.flatten(0, 1).T  # [rows, length, gates * most]
        best = (found.unflatten(-1, self.offset.shape) - self.offset).amax(-1)  # [rows, length, gates]
        blank = (states == 0).all(-1, keepdim=True)
        return best.masked_fill(blank, -torch.inf).movedim(-1, 0)


def _repeated(query: Tensor, most: int) -> Tensor:
    """`most` queries: the first once more where there are fewer, which no maximum notices."""
    return torch.cat([query, query[:1].expand(most - len(query), -1)])


def scores(gate: Gate, states: Tensor) -> Tensor:
    """What a `match` or `token` gate compares with its threshold, at every position: [rows, length]."""
    return Detectors([gate]).scores(states)[0]


# time


def _timed(gate: Gate, times: Tensor) -> Tensor:
    """The factor of a `window` or `curve` gate at timesteps [rows]: [rows]."""
    if gate.kind == "window":
        return ((times >= gate.params["low"]) & (times <= gate.params["high"])).float()
    return _interpolated(times, *(gate.tensors[slot].to(times) for slot in ("times", "values")))


def _interpolated(asked: Tensor, times: Tensor, values: Tensor) -> Tensor:
    """Linear between the given times, constant beyond them, never outside 0..1."""
    right = torch.searchsorted(times, asked).clamp(max=len(times) - 1)
    left = (right - 1).clamp(min=0)
    gap = (times[right] - times[left]).clamp(min=1e-6)
    part = ((asked - times[left]) / gap).clamp(0, 1)
    return (values[left] + part * (values[right] - values[left])).clamp(0, 1)


# together


@dataclass(frozen=True)
class Text:
    """What the text gates say of some text states, whatever the timestep.

    `match`: [match gates, rows]; `places`: edit -> [rows, length], the product of its `token` gates,
    on the device of the states; `peaks`: [edits, rows], the largest of that in each row, else 1; `told`:
    [sight gates, rows], where it opens a gate that a `sight` gate is told by.
    """

    match: Tensor
    places: Mapping[int, Tensor]
    peaks: Tensor
    told: Tensor


@dataclass(frozen=True)
class Strengths:
    """How strongly each edit acts on each row, its scale included.

    `rows` [edits, rows] on the CPU; an edit behind `token` gates has [rows, length] in `places`
    instead. `levels` [edits, rows]: the largest absolute strength in each row.
    """

    rows: Tensor
    places: Mapping[int, Tensor]
    levels: Tensor


class Panel:
    """All gates of some edits, each of them once: `text`, then `strengths` at every timestep."""

    def __init__(self, edits: Iterable[Edit]) -> None:
        self.edits = tuple(edits)
        gates = {gate.name: gate for edit in self.edits for gate in edit.gates}
        self.match = {name: gate for name, gate in gates.items() if gate.kind in WHOLE}
        self.token = {name: gate for name, gate in gates.items() if gate.kind == "token"}
        self.timed = {name: gate for name, gate in gates.items() if gate.kind in TIMED}
        self.sight = {name: gate for name, gate in gates.items() if gate.kind == SIGHT}
        self.behind_token = {
            index: [gate.name for gate in edit.gates if gate.kind == "token"]
            for index, edit in enumerate(self.edits)
            if any(gate.kind == "token" for gate in edit.gates)
        }
        self.scale = torch.tensor([[float(edit.scale)] for edit in self.edits])  # [edits, 1]
        self._columns = self._lines()
        self._detectors = self._stacked()

    def _lines(self) -> Tensor:
        """[edits, most]: where the table of row factors has each edit's gates, padded with its ones."""
        places = {name: line for line, name in enumerate([*self.match, *self.timed, *self.sight])}
        lines = [[places[g.name] for g in e.gates if g.name in places] for e in self.edits]
        most = max(map(len, lines), default=0)
        return torch.tensor([line + [len(places)] * (most - len(line)) for line in lines]).long()

    def _stacked(self) -> list[tuple[list[str], Tensor, Detectors]]:
        """Names, thresholds and detectors of the text gates, one stack for each kind of `parts`."""
        groups: dict[tuple[int, ...], dict[str, Gate]] = {}
        for name, gate in (self.match | self.token).items():
            groups.setdefault(tuple(gate.params.get("parts") or ()), {})[name] = gate
        return [
            (list(g), torch.tensor([x.params["threshold"] for x in g.values()]), Detectors(list(g.values())))
            for g in groups.values()
        ]

    def text(self, states: Tensor) -> Text:
        """Read every `match` and `token` gate for text states [rows, length, width]."""
        with torch.set_grad_enabled(bool(SLOPE.get()) and torch.is_grad_enabled()):
            return self._text(states if torch.is_grad_enabled() else states.detach())

    def _text(self, states: Tensor) -> Text:
        match = torch.ones(len(self.match), len(states))
        order = {name: line for line, name in enumerate(self.match)}
        opened: dict[str, Tensor] = {}  # token gate -> [rows, length]
        for names, thresholds, detectors in self._detectors:
            found = detectors.scores(states)  # [gates, rows, length]
            margin = found - thresholds.to(found.device)[:, None, None]
            most = margin.amax(-1).cpu()  # [gates, rows]; the one wait for the device
            rows = hard(most)
            for line, name in enumerate(names):
                if name in order:
                    gate = self.match[name]
                    soft = gate.kind == "similar"
                    match[order[name]] = _soft(gate, most[line]) if soft else rows[line]
                else:
                    opened[name] = hard(margin[line])
        places = {i: torch.stack([opened[n] for n in ns]).prod(0) for i, ns in self.behind_token.items()}
        peaks = torch.ones(len(self.edits), len(states))
        for index, place in places.items():
            peaks[index] = place.amax(-1).cpu()
        told = torch.zeros(len(self.sight), len(states), dtype=torch.bool)
        for line, gate in enumerate(self.sight.values()):
            told[line] = (match[[order[n] for n in gate.params.get("told", ()) if n in order]] > 0).any(0)
        return Text(match, places, peaks, told)

    def strengths(self, text: Text, times: Tensor | None, seen: Tensor | None = None) -> Strengths:
        """Every edit's strength for a text at timesteps [rows] (on the CPU; None without timed gates).

        `seen` [sight gates, rows]: what the `sight` gates say; None: all of them are open.
        """
        ones = torch.ones(1, text.match.shape[1])
        seen = ones.expand(len(self.sight), -1) if seen is None else seen
        timed = [_timed(gate, times)[None] for gate in self.timed.values()] if times is not None else []
        table = torch.cat([text.match, *timed, seen, ones])  # [gates + 1, rows]
        rows = self.scale * table[self._columns].prod(1)  # [edits, rows]
        places = {i: rows[i].to(place.device)[:, None] * place for i, place in text.places.items()}
        return Strengths(rows, places, rows.abs() * text.peaks)


def factor(edit: Edit, signal: Signal) -> Tensor:
    """The product of an edit's gates: [rows], or [rows, length] when a `token` gate takes part.

    Where a curve differs from site to site, the largest. A `sight` gate, which needs a picture, counts
    as open.
    """
    panel = Panel(by_site([replace(edit, scale=1.0)])[0])
    found = panel.strengths(panel.text(signal.states), signal.timesteps.float().cpu())
    each = [found.places.get(index, found.rows[index]) for index in range(len(panel.edits))]
    return torch.stack(each).amax(0).to(signal.states.device)
