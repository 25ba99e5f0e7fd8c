"""Pictures of probes, drawn once: batches under their digest in the cache, so runs share and resume.

A picture drawn in a batch depends on the batch within rounding, so the batch is the unit that is
kept: same base, edits, settings, prompts and seeds, same file. A run that was killed draws the
missing batches and ends with the same pictures, bit for bit. So does one of several processes: inside
`drawn_by` a team each draws its share, and reads what the others drew. A batch in which no gate can
open is the base's, bit for bit, and is not drawn twice.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from conceptzap.base import Base, Cond, parameters
from conceptzap.edit import Edit, canonical_json, sort_edits, tensor_bytes
from conceptzap.format import atomic, cache
from conceptzap.report import Report
from conceptzap.result import Probe, Settings
from conceptzap.runtime.gates import TEXT, Signal, factor
from conceptzap.runtime.sampler import Start, drawings, drawings_from

KIND = "pictures"
CHUNK = 32  # prompts encoded together


class Team(Protocol):
    """Processes that do the same in the same order, with one cache."""

    def share(self, items: Sequence[Callable[[], object]]) -> Sequence[tuple[int, Callable[[], object]]]:
        """Those of the items that are this process's, numbered."""

    def wait(self) -> None:
        """Until all are here."""


_TEAM: ContextVar[Team | None] = ContextVar("team", default=None)


@contextmanager
def drawn_by(team: Team) -> Iterator[None]:
    """Inside the block what is drawn is shared among the processes of a team."""
    token = _TEAM.set(team)
    try:
        yield
    finally:
        _TEAM.reset(token)


def ahead(work: Sequence[Callable[[], object]], label: str, report: Report) -> None:
    """This process's share of what is about to be read from the cache, until the others have done theirs."""
    team = _TEAM.get()
    if team is None:
        return
    mine = [job for _, job in team.share(work)]
    for job in report.count(mine, len(mine), label):
        job()
    team.wait()


@dataclass(frozen=True)
class ImageBatch:
    """Some consecutive probes with their pictures, uint8 [n, h, w, 3], and the edits open for each."""

    probes: tuple[Probe, ...]
    pictures: np.ndarray
    fired: tuple[frozenset[str], ...]


def base_digest(base: Base) -> str:
    """sha256 over everything a picture depends on: all weights, number formats, schedule, device type."""
    digest = hashlib.sha256()
    about = [base.family, base.prediction, str(base.dtype), base.device.type, base.size]
    digest.update(canonical_json([*about, dict(base.scheduler_config)]).encode())
    for module in (base.unet, *base.text_encoders, base.vae):
        for name, value in parameters(module):
            digest.update(canonical_json([name, list(value.shape)]).encode())
            digest.update(tensor_bytes(value))
    return digest.hexdigest()


def edits_digest(edits: Sequence[Edit]) -> str:
    """sha256 over the names of edits as `CachedSampler` has them; "" for the base itself."""
    names = [edit.name for edit in edits]
    return hashlib.sha256(canonical_json(names).encode()).hexdigest() if names else ""


def acted_on(
    base: Base, edits: Sequence[Edit], asked: Sequence[Probe], settings: Settings
) -> list[bool]:
    """Whether an edit can act on each picture at all: a shut gate is an absent edit, bit for bit.

    Only gates that read the text alone can say so beforehand.
    """
    by_text = [replace(e, gates=tuple(g for g in e.gates if g.kind in TEXT)) for e in edits]
    if not all(edit.gates for edit in by_text):
        return [True] * len(asked)
    prompts = [probe.prompt for probe in asked]
    chunks = [base.encode(prompts[i : i + CHUNK]).states for i in range(0, len(prompts), CHUNK)]
    states = torch.cat([base.unconditional(settings.negative).states, *chunks])  # [1 + n, length, width]
    text = Signal(states, torch.zeros(len(states), device=states.device))
    factors = [factor(edit, text).reshape(len(states), -1) for edit in by_text]
    acts = torch.stack([found.ne(0).any(1) for found in factors]).any(0).tolist()  # [1 + n]
    return [acts[0] or row for row in acts[1:]]


def start_digest(start: Start) -> str:
    """sha256 over all that pictures are drawn from."""
    conds = [start.cond] if isinstance(start.cond, Cond) else start.cond
    parts = [part for cond in conds for part in (cond.states, cond.pooled, cond.time_ids)]
    digest = hashlib.sha256(canonical_json([start.first, len(conds)]).encode())
    for part in (*parts, start.latents, start.known, start.mask):
        if part is not None:
            digest.update(canonical_json(list(part.shape)).encode() + tensor_bytes(part))
    return digest.hexdigest()


class CachedSampler:
    """Draws probes with one base under some edits; `store` is the folder that keeps the batches.

    Equal edits count once and those of strength 0 not at all, so that the key of a batch says
    exactly what is attached when it is drawn. With `anew`, what no edit can act on is drawn all the
    same: to measure whether it is the base's.
    """

    def __init__(
        self,
        base: Base,
        settings: Settings,
        edits: Sequence[Edit] = (),
        store: Path | None = None,
        digest: str = "",
        anew: bool = False,
    ) -> None:
        self.base, self.settings, self.anew = base, settings, anew
        self.edits = sort_edits(edit for edit in edits if edit.scale)
        self.store = store or cache.folder(KIND)
        self.digest = digest or base_digest(base)
        # everything that the pictures of all batches have in common
        self.model = canonical_json([self.digest, edits_digest(self.edits), settings.record()])

    def count(self, probes: Sequence[Probe]) -> int:
        """How many batches `batches` yields."""
        return sum(1 for _ in self.groups(probes))

    def groups(self, probes: Sequence[Probe]) -> Iterator[tuple[Probe, ...]]:
        """The probes of every batch; none mixes slices."""
        for _, group in groupby(probes, key=lambda probe: probe.slice):
            members = tuple(group)
            for start in range(0, len(members), self.settings.batch):
                yield members[start : start + self.settings.batch]

    def batches(self, probes: Sequence[Probe]) -> Iterator[ImageBatch]:
        """All probes in order, in batches that never mix slices."""
        yield from map(self.batch, self.groups(probes))

    def batch(self, probes: tuple[Probe, ...]) -> ImageBatch:
        """One batch, read from the store or drawn and put there."""
        path = self.path(probes)
        kept = _read(path, probes)
        if kept is not None:
            return kept
        if self._untouched(probes):
            return CachedSampler(self.base, self.settings, (), self.store, self.digest).batch(probes)
        drawn = self._draw(probes)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_atomic(path, _png(drawn), force=True)
        return drawn

    def started(self, probes: tuple[Probe, ...], start: Start) -> ImageBatch:
        """The probes drawn from conditioning and latents of their own, read from the store or drawn."""
        path = self.path(probes, start_digest(start))
        kept = _read(path, probes)
        if kept is not None:
            return kept
        drawn = list(drawings_from(self.base, start, self.settings, self.edits))
        pictures = np.stack([np.asarray(picture) for picture, _ in drawn])  # [n, h, w, 3]
        done = ImageBatch(probes, pictures, tuple(fired for _, fired in drawn))
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_atomic(path, _png(done), force=True)
        return done

    def path(self, probes: Sequence[Probe], beside: str = "") -> Path:
        """Where the pictures of some probes are kept; `beside` is what they are drawn from, if not these."""
        asked = [[probe.prompt, probe.seed] for probe in probes]
        content = canonical_json([self.model, asked, *([beside] if beside else [])])
        key = hashlib.sha256(content.encode()).hexdigest()
        return self.store / key[:2] / f"{key}.png"

    def _untouched(self, probes: Sequence[Probe]) -> bool:
        """Whether there are edits, of which none can act on any picture of a batch."""
        if self.anew or not self.edits:
            return False
        return not any(acted_on(self.base, self.edits, probes, self.settings))

    def _draw(self, probes: tuple[Probe, ...]) -> ImageBatch:
        prompts, seeds = [p.prompt for p in probes], [p.seed for p in probes]
        drawn = list(drawings(self.base, prompts, seeds, self.settings, self.edits))
        pictures = np.stack([np.asarray(one.picture) for one in drawn])  # [n, h, w, 3]
        return ImageBatch(probes, pictures, tuple(one.fired for one in drawn))


def _png(batch: ImageBatch) -> bytes:
    """The pictures of a batch one below the other, with what fired for each as text."""
    count, height, width, _ = batch.pictures.shape
    about = PngImagePlugin.PngInfo()
    about.add_text("count", str(count))
    about.add_text("fired", json.dumps([sorted(names) for names in batch.fired]))
    sheet = Image.fromarray(batch.pictures.reshape(count * height, width, 3))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def _read(path: Path, probes: tuple[Probe, ...]) -> ImageBatch | None:
    """The batch at `path`, None where it is missing or damaged (it is then drawn again)."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
            fired = json.loads(sheet.text["fired"])
    except (OSError, SyntaxError, KeyError, ValueError, AttributeError):
        return None
    if len(fired) != len(probes) or len(pixels) % len(probes):
        return None
    pictures = pixels.reshape(len(probes), -1, *pixels.shape[1:])  # [n, h, w, 3]
    return ImageBatch(probes, pictures, tuple(frozenset(names) for names in fired))
