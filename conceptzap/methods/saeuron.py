"""SAeUron: features of a sparse autoencoder that fire for the concept are turned against it, behind a gate.

Cywinski and Deja 2025, on the output of the decoder's blocks of transformers. A feature i of timestep t
has the score mu_i(t, concept) / sum_j mu_j(t, concept) - the same of everything else, mu its mean
activation over pictures and places; of those with the highest scores, wherever f_i > mu_i(t, everything
else), f_i <- gamma mu_i(t, concept) f_i, and what the autoencoder cannot explain stays. The autoencoder is
the base's (`training/dictionary.py`), so the file carries the chosen features' rows, gains and thresholds.
Differs: `features` instead of a percentile; everything else is the larger of two means, of the same
prompts with the anchor and of what stays, so that what is merely of the same things does not count; the
dictionary's threshold in place of the k n largest of a batch; activations of unit scale, which gamma depends
on; a gate on the text, since without it they are turned in the unconditional half and in other pictures,
too; a `ratio`, above 1 to choose only those that are weaker elsewhere by so much. Figures without the gate
are in `docs/figures.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.errors import UsageError
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import activations, dictionary, lessons
from conceptzap.training.dictionary import Dictionary, Recipe
from conceptzap.training.objectives import Trajectories
from conceptzap.trust import canary

PAPER = "2501.18052"
EDITS = "adapter, gated"


@dataclass(frozen=True)
class Config:
    sites: str = "unet.up_blocks.1.attentions.1"  # a dictionary each; .1 or (styles) .2 in the paper
    multiplier: float = 20.0  # -gamma; 1 for styles, up to 30 for objects in the paper
    features: int = 32  # of the highest scores at every timestep; 1 to 3 of 20,480 in the paper
    ratio: float = 1.0  # of its mean to that elsewhere, of what is chosen, at least; none in the paper
    gate: bool = True  # a gate on the text, for each concept its own; published without
    keep_prompts: int = 400  # prompts that the gate stays shut for
    trajectories: int = 24  # pictures with the concept, as many with the anchor, and of what stays
    dictionary: str = ""  # a file to load it from; none: this base's own is trained once and kept
    expansion: int = 8  # features of the dictionary to a width; 16 in the paper
    k: int = 32  # of them at a place on the average
    dictionary_steps: int = 2000  # of its training
    dictionary_rows: int = 1024  # of a step; 4096 in the paper
    dictionary_lr: float = 0.001  # 0.0004 in the paper
    pictures: int = 128  # that the dictionary is learned from


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    recipe = Recipe(
        cfg.expansion, cfg.k, cfg.dictionary_steps, cfg.dictionary_rows, cfg.pictures, cfg.dictionary_lr
    )
    sites = activations.matching(base, cfg.sites)
    words = dictionary.of(base, sites, recipe, report, cfg.dictionary)
    for lesson in lessons.lessons(base, task, report):
        shown = Trajectories.of(base, lesson.pairs, cfg.trajectories, report)
        alike = Trajectories.of(base, lesson.swapped, cfg.trajectories, report)
        rest = Trajectories.kept(base, lesson.keep, cfg.trajectories, report)
        means, *others = (averages(base, one, words, report) for one in (shown, alike, rest))
        other = {site: torch.maximum(*(one[site] for one in others)) for site in sites}
        made = [against(site, words[site], means[site], other[site], shown.times, cfg) for site in sites]
        if not (made := canary.acting(base, made, lesson.concept)):
            message = f"no feature of {', '.join(sites)} fires for {lesson.concept}"
            raise UsageError(message, "try more features, other sites or a larger dictionary")
        if cfg.gate:
            gate = lessons.gate(base, [lesson], report.seed, cfg.keep_prompts, report=report)
            made = [replace(edit, gates=(gate,)) for edit in made]
        yield from made


def averages(
    base: Base, drawn: Trajectories, words: Mapping[str, Dictionary], report: Report
) -> dict[str, Tensor]:
    """Site -> mean activation of every feature over pictures and places, [times, m]."""
    steps = [
        {site: torch.stack([words[site].features(x).mean(0) for x in found[site]]).mean(0) for site in words}
        for found in activations.along(base, drawn, tuple(words), report)
    ]
    return {site: torch.stack([step[site] for step in steps]) for site in words}


def scores(means: Tensor, others: Tensor) -> Tensor:
    """How much larger a share of all activation a feature has with the concept, [times, m]."""
    shares = [one / one.sum(1, keepdim=True).clamp_min(1e-8) for one in (means, others)]
    return shares[0] - shares[1]


def against(
    site: str, words: Dictionary, means: Tensor, others: Tensor, times: Tensor, cfg: Config
) -> Edit:
    """f_i D_i (gamma mu_i - 1) added where a chosen feature exceeds its mean elsewhere."""
    found = scores(means, others).where(means >= cfg.ratio * others, 0)  # [times, m]
    best = found.topk(min(cfg.features, found.shape[1]), dim=1)
    chosen = torch.zeros_like(found, dtype=torch.bool).scatter(1, best.indices, best.values > 0)
    rows = chosen.any(0).nonzero()[:, 0]  # of any timestep, [r]
    if not len(rows):  # none has more of it: one that does nothing, which is left out
        rows = best.indices[0, :1]
    gain = -cfg.multiplier * means[:, rows] - 1
    tensors = {
        "down": words.encoder[rows],
        "bias": words.bias[rows],
        "center": words.center,
        "up": words.decoder[rows].T.contiguous(),
        "gain": torch.where(chosen[:, rows], gain, 0),
        "threshold": others[:, rows].clamp(min=words.threshold),
        "times": times.float(),
    }
    return Edit("adapter", (site,), tensors, {"phi": "relu", "reads": "y"})
