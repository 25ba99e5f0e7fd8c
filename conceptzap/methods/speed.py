"""SPEED: a closed-form change of the values that is confined to the null space of what stays.

Li et al. 2026: with c_t the states that go and c_a their anchors, C_1 = mean c_t c_t^T, C* = mean c_a c_t^T,
P the projector on directions that the kept states hardly use, K the invariants (start of text, empty prompt),
dW = W (C* - C_1) P Q M,  M = (C_1 P + eta I)^-1,  Q = I - M K (K^T P M K + lambda I)^-1 K^T P.
Kept states are chosen by influence: those that the unconstrained edit moves more than the mean, and
noisy copies of them along the direction to which W is most blind (directed augmentation), chosen again.
Differs: influence and blindness are those of all values together, not of one layer, so that one pair
serves all layers; all token states from the concept on may be moved (`last` moves its last one, as the
paper does but for nudity), cut to `rank`; the threshold is a share of the kept states' mean energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import closed_form, subspace
from conceptzap.training.closed_form import Moves
from conceptzap.training.lessons import lessons
from conceptzap.training.solving import Solving, Unsolved, solved
from conceptzap.training.states import once

PAPER = "2503.07392"
EDITS = "weight"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.*.attn2.to_v"  # values only
    rank: int = 8
    last: bool = False  # move the concept's last token alone
    threshold: float = 0.05  # energy of a direction that counts as null, of the kept states' mean
    eta: float = 0.02  # ridge; 1 in the paper, on sums over states
    slack: float = 0.0  # lambda of the invariants: 0 keeps them exactly
    copies: int = 3  # noisy copies of a kept state; 10 in the paper
    noise: float = 0.1  # of a copy, of the states' mean length
    keep_prompts: int = 400  # prompts that the kept states are chosen from


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    yield from solved([unsolved(base, task, cfg, report)])[0]


def unsolved(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Unsolved]:
    told = subspace.states_of(base, list(lessons(base, task, report)), cfg.keep_prompts, report)
    sites, empty = base.sites(cfg.sites), base.encode([""])
    sums = summed(told, once(base, ("sight", *sites), lambda: sight(_values(base, sites))), cfg, report.seed)
    fixed = invariants(empty.states[0].cpu().double())
    yield closed_form.edit_of(sites, _pair(sums, fixed, cfg))
    if told.pooled:
        weight = closed_form.pooled_weight(base, told.pooled.source.shape[1])
        sums = summed(told.pooled, sight(weight), cfg, report.seed)
        yield closed_form.pooled_edit_of(base, _pair(sums, empty.pooled.T.cpu().double(), cfg))


def _values(base: Base, sites: Sequence[str]) -> Tensor:
    """All layers' weights as one, [out, d]."""
    return torch.cat([base.module(site).weight.detach().cpu().double() for site in sites])


def _pair(sums: Moves, fixed: Tensor, cfg: Config) -> Solving[dict[str, Tensor]]:
    """The constrained change of what layers read, but for the invariants `fixed` [d, k]."""
    change = yield from null_constrained(sums, fixed, cfg)
    return (yield from subspace.cut(change, sums.gram, min(cfg.rank, sums.n)))


def sight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """R [d, d], |R x| = |W x| for layers W [out, d], and the direction [d] to which they are most blind."""
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T, vectors[:, 0]


def summed(
    told: subspace.States, layers: tuple[Tensor, Tensor], cfg: Config, seed: int
) -> Moves:
    """The sums over what moves and over the kept states that layers of this `sight` are moved by."""
    rows = told.last if cfg.last else slice(None)
    source, target = told.source[rows], told.target[rows]  # [n, d]
    sums = Moves.of(source, target, told.keep[:0])
    sums.keep(influenced(sums, told.keep, layers, cfg, seed))
    return sums


def influenced(
    sums: Moves, keep: Tensor, layers: tuple[Tensor, Tensor], cfg: Config, seed: int
) -> Tensor:
    """Kept states [m, d] that the unconstrained edit moves more than the mean, and copies of them."""
    reads, blind = layers
    ridge = torch.linalg.inv(sums.gram / sums.n + torch.eye(sums.width, dtype=keep.dtype))
    naive = reads @ sums.cross / sums.n @ ridge  # [d, d], as long as what is moved
    # 1. kept states that are moved more than the mean
    moved = keep @ naive.T  # [all, d]
    strong = moved.norm(dim=1) > moved.norm(dim=1).mean()
    chosen, moved, along = keep[strong], moved[strong], naive @ blind  # [m, d], [m, d], [d]
    # 2. of copies c + z b those of them: |c + z b|^2 = |c|^2 + 2 z c b + z^2 |b|^2 as they are moved
    shifts = torch.randn(cfg.copies, len(chosen), generator=torch.Generator().manual_seed(seed)).to(keep)
    shifts = shifts * cfg.noise * keep.norm(dim=1).mean()  # z [copies, m]
    squares = moved.square().sum(1) + 2 * shifts * (moved @ along) + shifts.square() * (along @ along)
    lengths = squares.clamp_min(0).sqrt()
    turn, which = (lengths > lengths.mean()).nonzero(as_tuple=True)
    return torch.cat([chosen, chosen[which] + shifts[turn, which, None] * blind])


def invariants(empty: Tensor, centres: int = 3, rounds: int = 10) -> Tensor:
    """K [d, 4]: the state of the start of text and k-means centres of the empty prompt's [length, d]."""
    start, rest = empty[:1], empty[1:]
    means = rest[:: max(1, len(rest) // centres)][:centres]
    for _ in range(rounds):
        nearest = torch.cdist(rest, means).argmin(1)
        members = F.one_hot(nearest, len(means)).to(rest)  # [length - 1, centres]
        sizes = members.sum(0)[:, None]
        means = torch.where(sizes > 0, members.T @ rest / sizes.clamp_min(1), means)
    return torch.cat([start, means]).T


def null_constrained(sums: Moves, fixed: Tensor, cfg: Config) -> Solving[Tensor]:
    """dW / W [d, d]: (C* - C_1) P Q M; zero on the invariants where there is no slack.

    In coordinates of the null space N (P = N N^T), where P M = N (N^T C_1 N + eta I)^-1 N^T = N A N^T.
    """
    null = yield from subspace.null_space(sums.kept, cfg.threshold)  # [d, k]
    seen, spared = null.T @ sums.gram @ null / sums.n, null.T @ fixed  # [k, k], [k, 4]
    a = yield torch.linalg.inv, seen + cfg.eta * torch.eye(len(seen)).to(seen)
    middle = spared.T @ a @ spared  # [4, 4], singular where P spares an invariant already
    inverse = torch.linalg.pinv(middle + cfg.slack * torch.eye(len(middle)).to(seen), hermitian=True)
    a = a - a @ spared @ inverse @ spared.T @ a
    return sums.cross @ null / sums.n @ a @ null.T
