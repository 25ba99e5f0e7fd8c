"""What trained methods share: the latents they learn on, targets, loss spaces, trainable edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from conceptzap.base import Base, Cond
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime.sampler import denoise
from conceptzap.training import memory, states
from conceptzap.training.train import Group, Losses, train
from conceptzap.training.wordings import Pair

T = TypeVar("T")
SPACES = ("noise", "x0")
PLACEMENTS = {
    "mid": ("unet.mid_block.*",),
    "midout": ("unet.mid_block.*", "unet.up_blocks.*"),
    "inmidout": ("unet.*",),
}
CHUNK = 24  # trajectories sampled together, where they fit
DENOISING = 10  # steps of a trajectory: as many timesteps as training sees
GUIDANCE = 3.0


@dataclass(frozen=True)
class Batch:
    """Rows of one training step: x_t [n, c, h, w] at t [n], and what each is conditioned on.

    `concept` asks for what is erased, `anchor` for what is drawn instead (the same prompts in a keep
    set). `share`: n as a share of the whole batch, by which a loss that is a mean over n counts.
    `prompts`: what `concept` was encoded from; `which` trajectory each row is of.
    """

    x: Tensor
    t: Tensor
    concept: Cond
    anchor: Cond
    share: float = 1.0
    prompts: tuple[str, ...] = ()
    which: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trajectories:
    """The base's own latents on the way from noise to pictures of the concept (ESD's x_t, cached).

    `latents` [steps, n, c, h, w], fp32 on the CPU, at `times` [steps]; trajectory i is of prompt i
    of `concept`, and of the prompt that should be drawn instead in `anchor`.
    """

    latents: Tensor
    times: Tensor
    concept: Cond
    anchor: Cond
    device: torch.device
    prompts: tuple[str, ...] = ()

    @staticmethod
    def of(base: Base, pairs: Sequence[Pair], n: int, report: Report, turn: int = 0) -> Trajectories:
        """n trajectories over prompt pairs, in a seeded order, as evenly as n allows.

        `turn` tells sets of one method apart, so that no two begin with the same noise.
        """
        return Trajectories.of_each(base, [pairs], n, report, turn)

    @staticmethod
    def of_each(
        base: Base, groups: Sequence[Sequence[Pair]], n: int, report: Report, turn: int = 0
    ) -> Trajectories:
        """The same, n for each of some groups of pairs: a concept of few wordings counts like any other."""
        seed = report.seed + turn
        orders = [subset(seed, pairs, len(pairs)) for pairs in groups]
        chosen = [order[i % len(order)] for i in range(n) for order in orders]
        concept, anchor = [pair.concept for pair in chosen], [pair.anchor for pair in chosen]
        latents, times = partial_sampling(base, concept, seed, report)
        return Trajectories(
            latents, times, base.encode(concept), base.encode(anchor), base.device, tuple(concept)
        )

    @staticmethod
    def kept(base: Base, prompts: Sequence[str], n: int, report: Report) -> Trajectories:
        """The same for prompts that stay what they are."""
        return Trajectories.of(base, [Pair(prompt, prompt) for prompt in prompts], n, report, 1)

    def draw(self, generator: torch.Generator, batch: int, part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` of a batch, uniform over timesteps and trajectories."""
        steps, n = self.latents.shape[:2]
        when = torch.randint(steps, (batch,), generator=generator)  # [batch]
        which = torch.randint(n, (batch,), generator=generator)  # [batch]
        rows = slice(batch * part // parts, batch * (part + 1) // parts)
        when, which = when[rows], which[rows]
        index = which.tolist()
        x = self.latents[when, which].to(self.device)  # [rows, c, h, w]
        prompts = tuple(self.prompts[i] for i in index) if self.prompts else ()
        concept, anchor = self.concept[index], self.anchor[index]
        return Batch(x, self.times[when], concept, anchor, len(index) / batch, prompts, tuple(index))

    @torch.no_grad()
    def estimates(self, base: Base, t: int) -> Tensor:
        """What the base sees in all latents at one of the times, asked for the anchors: [n, c, h, w]."""
        x = self.latents[self.times.tolist().index(t)]  # [n, c, h, w]
        rows = min(memory.rows_that_fit(base, CHUNK), len(x))

        def seen(chunk: slice) -> Tensor:
            return base.eps(x[chunk].to(self.device), t, self.anchor[chunk])

        return torch.cat(list(memory.in_chunks(len(x), rows, seen)))


@torch.no_grad()
def partial_sampling(
    base: Base, prompts: Sequence[str], seed: int, report: Report
) -> tuple[Tensor, Tensor]:
    """One trajectory for each of n prompts: latents [steps, n, c, h, w] before every step, times [steps].

    As many are sampled together as memory allows; the prompt's place decides its noise. Methods
    of a list that learn the same of one concept share them.
    """
    key = "trajectories", tuple(prompts), seed
    return states.once(base, key, lambda: _sampled(base, prompts, seed, report))


def _sampled(base: Base, prompts: Sequence[str], seed: int, report: Report) -> tuple[Tensor, Tensor]:
    settings = Settings(steps=DENOISING, guidance=GUIDANCE)
    uncond = base.unconditional()

    def sample(chunk: slice) -> list[tuple[int, Tensor]]:
        noise = base.noise(range(seed + chunk.start, seed + chunk.stop))
        walk = denoise(base, base.encode(prompts[chunk]), uncond, settings, noise)
        walk = report.count(walk, DENOISING + 1, f"sampling {chunk.stop} of {len(prompts)}")
        return [(t, latents.cpu()) for t, latents in walk][:-1]

    rows = memory.rows_that_fit(base, 2 * CHUNK) // 2  # guidance doubles them
    chunks = list(memory.in_chunks(len(prompts), max(1, rows), sample))
    times = torch.tensor([t for t, _ in chunks[0]])
    latents = [torch.stack([latents for _, latents in chunk]) for chunk in chunks]
    return torch.cat(latents, 1), times


def optimise(
    base: Base,
    groups: Mapping[str, Group],
    losses: Losses,
    report: Report,
    *,
    steps: int,
    batch: int,
    about: Mapping[str, object],
) -> None:
    """Train edits on a base to the end, shown and kept by `report`.

    `about`: all that the result depends on beside the plan. See `train.train` for the rest.
    """
    events = train(
        groups,
        losses,
        steps=steps,
        batch=batch,
        half=base.dtype == torch.float16,
        frugal=memory.recomputing(base),
        session=report.session(about),
    )
    for _ in report.progress(events):
        pass


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one training step; drawing all from it makes a run resumable without state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def distance(base: Base, eps: Tensor, target: Tensor, t: Tensor, space: str) -> Tensor:
    """Mean squared error per row in noise space, or in the x0 space of the EAP and KPOP code.

    x0 = (x_t - sqrt(1 - a) eps) / sqrt(a), so that space weighs a step by (1 - a) / a: about 200 at
    t = 1000 and .01 at t = 20. Where a schedule ends without signal (a = 0) it weighs 1000.
    """
    if space not in SPACES:
        raise UsageError(f"unknown loss space {space!r}", f"use {' or '.join(SPACES)}")
    error = (eps - target).pow(2).flatten(1).mean(1)
    if space == "x0":
        alpha = base.alphas[t.to(base.alphas.device)].to(error).clamp(min=1e-3)
        error = error * (1 - alpha) / alpha
    return error.mean()


def negative_guidance(eps_concept: Tensor, eps_anchor: Tensor, eta: float) -> Tensor:
    """eps_a - eta (eps_c - eps_a), away from the concept: ESD, eq. 5, a for the empty prompt."""
    return eps_anchor - eta * (eps_concept - eps_anchor)


def placed(base: Base, placement: str) -> tuple[str, ...]:
    """Cross-attentions in the middle block, also behind it, or everywhere (KPOP's `mode`)."""
    if placement not in PLACEMENTS:
        raise UsageError(f"unknown placement {placement!r}", f"use {', '.join(PLACEMENTS)}")
    return tuple(s for pattern in PLACEMENTS[placement] for s in base.sites(f"{pattern}.attn2"))


def prompt(
    base: Base, text: str, size: int, placement: str, seed: int, **rest: Any
) -> Edit:
    """A trainable pair of K and V prompts in context space, begun as the states of a text.

    `size` tokens [size, width] each, or as many as the states after the text's start token allow;
    `rest` are the edit's gates and role.
    """
    start = base.encode([text]).states[0, 1 : 1 + size].float().cpu()
    noise = torch.randn(2, *start.shape, generator=torch.Generator().manual_seed(seed))
    rows = start + 0.02 * start.std() * noise
    slots = {f"prompt_{letter}": parameter(rows[i], base) for i, letter in enumerate("kv")}
    return Edit("tokens", placed(base, placement), slots, **rest)


def low_rank(base: Base, pattern: str, rank: int, seed: int, role: str = "erase") -> list[Edit]:
    """A trainable `up down` edit at every matching Linear; up starts at zero: no change yet."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for site in base.sites(pattern):
        weight = getattr(base.module(site), "weight", None)
        if weight is None or weight.ndim != 2:
            continue
        out, width = weight.shape
        r = min(rank, out, width)
        down = torch.randn(r, width, generator=generator) / width**0.5
        edits.append(
            Edit(
                "weight",
                (site,),
                {"up": parameter(torch.zeros(out, r), base), "down": parameter(down, base)},
                role=role,
            )
        )
    if not edits:
        raise UsageError(
            f"no Linear of this base matches {pattern!r}", "for example: unet.*.attn2.to_*"
        )
    return edits


def parameter(tensor: Tensor, base: Base) -> nn.Parameter:
    return nn.Parameter(tensor.to(base.device, torch.float32))


def parameters(edits: Sequence[Edit]) -> dict[str, nn.Parameter]:
    """Trainable tensors by edit index and slot."""
    return {f"{i}.{slot}": t for i, edit in enumerate(edits) for slot, t in edit.tensors.items()}


def subset(seed: int, items: Sequence[T], n: int) -> list[T]:
    """n items in a seeded random order, without repeats."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[index] for index in order[:n]]
