"""Who is attacked: a base under edits, the concept to be brought back, and the probes that must show it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit, Json, canonical_json
from conceptzap.errors import MismatchError
from conceptzap.evaluation.cached import base_digest, edits_digest
from conceptzap.evaluation.probes import Subject, World
from conceptzap.format import atomic, cache
from conceptzap.report import Report
from conceptzap.result import Probe, Settings
from conceptzap.runtime import gates, sight, texts
from conceptzap.runtime.attach import attached
from conceptzap.runtime.guides import Guidance
from conceptzap.runtime.sampler import denoise

KIND = "attacks"
SECONDS = "seconds"  # beside what was found
SEARCHED = 3  # one more whenever a search comes to something else by the same settings
TRANSFER, STRAIGHT, EVADE, CONTINUOUS = "transfer", "straight-through", "evade", "continuous"
Tensors = dict[str, Tensor]
TEXT_GATES = ("match", "similar", "token")


@dataclass(frozen=True)
class Victim:
    """A base under edits, and what is asked of it; `digest` is the base's.

    `probes` all ask for `target`, by name. Nothing here looks at a judge. `teacher`: the checkpoint that
    knows the concept as it was, and `taught` its digest: of an oracle, which itself never learned it, and of
    a base whose text encoders have been erased.
    """

    base: Base
    edits: tuple[Edit, ...]
    target: Subject
    world: World
    probes: tuple[Probe, ...]
    settings: Settings
    seed: int
    digest: str
    teacher: Base | None = None
    taught: str = ""
    never: bool = False  # an oracle: whatever it shows was not learned
    only: tuple[str, ...] = ()  # forms that are searched in; all that differ where none is named
    spent: dict[str, float] = field(default_factory=dict, compare=False)  # seconds of what earlier runs kept

    @staticmethod
    def of(base: Base, edits: Sequence[Edit], target: Subject, **rest: Any) -> Victim:
        """Edits of the text encoders become weights of its own base, which learns from the plain one."""
        own, left = texts.baked(base, edits)
        if own is not base:
            rest = {"teacher": base, "taught": base_digest(base), **rest}
        return Victim(own, left, target, digest=base_digest(own), **rest)

    def oracle(self, other: Base) -> Victim:
        """The same asked of a checkpoint that never knew the concept, to which its pictures are shown."""
        if not _same_pictures(self.base, other):
            hint = "train it with the same VAE at the same size"
            raise MismatchError(f"{other.id} has other latents than {self.base.id}", hint)
        beside = {"teacher": self.knows, "taught": self.taught or self.digest, "never": True, "spent": {}}
        return replace(self, base=other, edits=(), digest=base_digest(other), **beside)

    @property
    def knows(self) -> Base:
        """Who draws the concept for the attacker to look at."""
        return self.teacher or self.base

    @property
    def reads(self) -> Base:
        """By whose text encoders the attacker means the concept: those that know it, an oracle's its own."""
        return self.base if self.never else self.knows

    def on(self, form: str) -> Victim:
        """Who a form of search sees: `transfer` nothing that was erased, of texts neither."""
        if form != TRANSFER or self.never or self.teacher is None:
            return self
        return replace(self, base=self.teacher, edits=(), digest=self.taught, teacher=None, taught="")

    @property
    def words(self) -> tuple[str, ...]:
        """Every word for the target, its name first."""
        return (*self.target.words, *self.target.held_out)

    @property
    def prompts(self) -> list[str]:
        return [probe.prompt for probe in self.probes]

    @property
    def seeds(self) -> list[int]:
        return [probe.seed for probe in self.probes]

    @cached_property
    def watched(self) -> bool:
        """Whether some gate of its edits looks at the picture."""
        return any(gate.kind == gates.SIGHT for edit in self.edits for gate in edit.gates)

    @cached_property
    def paired(self) -> bool:
        """Whether what its edits do depends on rows that have no prompt, beside those that have one."""
        return self.watched or any("without" in edit.tensors for edit in self.edits)

    @cached_property
    def _seen(self) -> list[Tensor]:
        """What gates that look at the picture said of the last call of `eps`."""
        return []

    @cached_property
    def gates(self) -> tuple[gates.Gate, ...]:
        """The gates of its edits that read text, each once."""
        found = {g.name: g for edit in self.edits for g in edit.gates if g.kind in TEXT_GATES}
        return tuple(found.values())

    # -- what is remembered --------------------------------------------------------------------

    @cached_property
    def identity(self) -> Json:
        """All that what is asked of the base depends on, but for its edits."""
        probes = [[probe.prompt, probe.seed] for probe in self.probes]
        return [self.digest, self.taught, self.settings.record(), probes, self.target.name, self.seed]

    def once(self, about: Json, make: Callable[[], Tensors], form: str = STRAIGHT) -> Tensors:
        """What `make` finds, kept in the cache under the victim and `about`: a stopped attack goes on.

        What was found on the base alone (`form` transfer) is the same for every erasure.
        """
        under = "" if form == TRANSFER else edits_digest(self.edits)
        key = hashlib.sha256(canonical_json([SEARCHED, self.identity, under, about]).encode()).hexdigest()
        path = cache.folder(KIND) / key[:2] / f"{key}.safetensors"
        kept = _read(path)
        if kept is None:
            began = time.monotonic()
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            kept[SECONDS] = torch.tensor(time.monotonic() - began)
            self.spent[key] = 0.0
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_atomic(path, save(kept), force=True)
        else:
            self.spent.setdefault(key, float(kept[SECONDS]))
        return {name: tensor.to(self.base.device) for name, tensor in kept.items() if name != SECONDS}

    def in_parts(self, about: Json, make: Callable[[slice], Tensors], form: str = STRAIGHT) -> Tensors:
        """What `make` finds for some of the probes, [n, ...] each: kept batch by batch, and joined."""
        parts = [
            self.once([*about, [at.start, at.stop]], lambda at=at: make(at), form)
            for at in self.batches(len(self.probes))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def generator(self, *numbers: int) -> torch.Generator:
        """A CPU generator of the attack's seed and some numbers."""
        text = canonical_json([self.seed, *numbers]).encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    # -- what the base knows -------------------------------------------------------------------

    def remembered(self, report: Report) -> Tensor:
        """Latents [n, c, h, w] of the pictures that who knows the concept draws for the probes."""
        return self.pictured(self.prompts, self.seeds, report)

    def pictured(self, prompts: Sequence[str], seeds: Sequence[int], report: Report) -> Tensor:
        """Latents [n, c, h, w] of the base's pictures of some prompts."""

        def make() -> Tensors:
            walks = (self.walk(prompts[at], seeds[at]) for at in self.batches(len(prompts)))
            count = len(list(self.batches(len(prompts))))
            parts = report.count(walks, count, "what the base draws")
            return {"latents": torch.cat([part[-1][1] for part in parts])}

        about = ["pictured", list(prompts), list(seeds)]
        return self.once(about, make, TRANSFER)["latents"]

    @torch.no_grad()
    def walk(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[float, Tensor]]:
        """(t, latents [n, c, h, w]) before every step of who knows the concept, and at the end."""
        base = self.knows
        cond, uncond = base.encode(prompts), base.unconditional(self.settings.negative)
        walk = denoise(base, cond, uncond, self.settings, base.noise(seeds))
        return [(t, latents.clone()) for t, latents in walk]

    def batches(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.settings.batch):
            yield slice(start, min(n, start + self.settings.batch))

    def noised(self, clean: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_t and the noise in it, each [n, c, h, w], for clean latents at t [n]."""
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        alpha = self.base.alphas.to(clean)[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, noise

    def forms(self, all_of_them: Sequence[str], texts: bool = False) -> list[str]:
        """The forms of a search that differ here, of `only` some: where no gate is, none is evaded.

        `texts`: it sees nothing but text encoders, so that `straight-through` is `transfer` unless these were
        erased. An oracle is searched on itself: what was found on its teacher says nothing of it.
        """
        same = {}  # form -> which it does not differ from
        if not (self.gates or self.watched):
            same[EVADE] = STRAIGHT
        erased = self.teacher is not None and not self.never  # of its texts
        if not erased and (texts or not (self.edits or self.never)):
            same[STRAIGHT] = TRANSFER
        elif self.never:
            same |= {TRANSFER: STRAIGHT} if STRAIGHT in all_of_them else {STRAIGHT: TRANSFER}

        def meant(form: str) -> str:
            """The last of those that it does not differ from, of those that there are."""
            found = form
            while form in same:
                form = same[form]
                found = form if form in all_of_them else found
            return found

        asked = {meant(form) for form in self.only or all_of_them}
        return [form for form in all_of_them if form in asked]

    # -- what an attacker sees -----------------------------------------------------------------

    @contextmanager
    def acting(self, form: str, more: Sequence[Edit] = ()) -> Iterator[None]:
        """Inside the block the UNet is what this form of attack searches on.

        `transfer`: the base as it is. The others: the base under the edits, whose text gates have a
        straight-through gradient.
        """
        edits = (() if form == TRANSFER else self.edits) + tuple(more)
        with ExitStack() as stack:
            if form != TRANSFER:
                stack.enter_context(gates.straight_through())
            if edits:
                stack.enter_context(attached(self.base, edits))
            yield

    def eps(
        self, form: str, x: Tensor, t: Tensor, cond: Cond, more: Sequence[Edit] = (), guided: bool = True
    ) -> Tensor:
        """The noise [n, c, h, w] seen in x at t [n], by what this form searches on; gradients flow.

        Where its edits move what guidance leads away from: what the base would have to see to draw the same.

        `guided`: what is found is drawn with guidance, if the settings have any.
        """
        # what looks at pairs has to be shown what it will see, and what acts on both halves, to act on both
        beside = self.paired and form != TRANSFER and guided and self.settings.guidance > 1
        with self.acting(form, more), sight.margins_seen() as seen:
            found = self._in_pairs(x, t, cond) if beside else self.base.eps(x, t, cond)
        self._seen[:] = [margins[:, -len(x) :] for margins in seen]
        return self._guided(x, t, *found.chunk(2)) if beside else found

    def _in_pairs(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The noise [2n, c, h, w] seen in x without the prompts and with them, in a call as samplers make."""
        both = Cond.cat([self._unasked(x, cond), cond])
        with Guidance(lambda rows: rows // 2).told():
            return self.base.eps(torch.cat([x, x]), torch.cat([t, t]), both)

    def _guided(self, x: Tensor, t: Tensor, without: Tensor, given: Tensor) -> Tensor:
        """The noise c with which the base itself would draw what the erased model draws, [n, c, h, w].

        Where edits make another u' of the base's u without the prompt: u' + w (c' - u') = u + w (c - u).
        """
        if all("without" not in edit.tensors for edit in self.edits):
            return given
        with torch.no_grad():
            plain = self.base.eps(x, t, self._unasked(x, self._without))
        return given + (1 - 1 / self.settings.guidance) * (plain - without)

    def _unasked(self, x: Tensor, like: Cond) -> Cond:
        """What x is drawn by without a prompt, n rows as `like` has them."""
        return self._without[[0] * len(x)].to(like.states.device, like.states.dtype)

    @cached_property
    def _without(self) -> Cond:
        """What rows without the prompt are drawn by, one row."""
        with torch.no_grad():
            return self.base.unconditional(self.settings.negative)

    def evasion(self, form: str, cond: Cond, slack: float = 0.2) -> Tensor:
        """relu(how far each gate is from shutting), summed over gates: [n]; 0 where not asked for.

        The forms that are aware of gates add it to their loss, after `eps` has drawn with `cond`: `evade`
        and `continuous`.
        """
        far = cond.states.new_zeros(len(cond))
        if form not in (EVADE, CONTINUOUS):
            return far
        for margins in self._seen:  # [gates, n]
            far = far + (margins + slack).relu().sum(0).to(far)
        return far + sum((gates.margins(gate, cond.states) + slack).relu() for gate in self.gates)


def _same_pictures(base: Base, other: Base) -> bool:
    """Whether two checkpoints mean the same by the same latents."""
    ours, theirs = base.vae.state_dict(), other.vae.state_dict()
    same = ours.keys() == theirs.keys() and base.noise([0]).shape == other.noise([0]).shape
    return same and all(torch.equal(value.cpu(), theirs[name].cpu()) for name, value in ours.items())


def _read(path: Path) -> Tensors | None:
    """The tensors at `path`, None where it is missing or damaged."""
    try:
        found = load(path.read_bytes())
        return found if SECONDS in found else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
