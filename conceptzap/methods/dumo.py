"""DuMo: what the skip connections carry of the concept is taken out, as much as timestep and layer need.

Han et al. 2025: the UNet stays as it is, and an eraser beside it writes into its skip connections and the
middle block through convolutions of 1 x 1 that begin at zero, h_i <- h_i + s_i(t) eraser_i(h_i). First the
eraser is trained, || eps_theta(x, c) - [eps(x, a) - eta (eps(x, c) - eps(x, a))] ||^2 beside what must stay;
then, with it fixed, the modulation s, 20 timesteps x 13 layers that begin at 1. At inference all of it is
multiplied by how near the prompt comes to the concept. Differs: the eraser is not a trained copy of the
encoder (361 million weights) but a bottleneck of `rank` features at every skip connection, up gelu(down x),
whose x, the decoder's state and the skip, has passed the base's own encoder; nearness is read from the text
states (`similar`); the paper's code of training is not public, its loss is that of SPM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.edit import Edit
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import distil, lessons, objectives
from conceptzap.training.objectives import Batch
from conceptzap.training.train import Group

PAPER = "2501.01125"
EDITS = "adapter, gated"
MIDDLE = "unet.mid_block"
TIMES = 1000


@dataclass(frozen=True)
class Config:
    rank: int = 8  # features of the eraser at a layer
    eta: float = 1.0  # negative guidance
    steps: int = 120  # of the eraser; 3000 in the paper
    modulating: int = 40  # steps of the modulation after that
    bins: int = 20  # timesteps that it tells apart
    batch: int = 6
    lr: float = 0.01
    modulating_lr: float = 0.02  # learning rate of these
    retain: float = 0.1  # of the keep set, which the gate spares anyway; 1000 on four anchors in the paper
    trajectories: int = 16
    power: float = 1.0  # of nearness, by which all is multiplied
    keep_prompts: int = 400  # prompts that the gate stays shut for
    directions: int = 2  # of the gate's detector


def erase(base: Base, task: Task, cfg: Config, report: Report) -> Iterator[Edit]:
    for lesson in lessons.lessons(base, task, report):
        edits = erasers(base, cfg.rank, cfg.bins, report.seed)
        sources = [draw(base, [lesson], cfg, report) for draw in distil.SOURCES]

        def terms(step: int, forget: Batch, keep: Batch, edits=edits) -> distil.Terms:
            concept, anchor = (distil.teacher(base, forget, c) for c in (forget.concept, forget.anchor))
            target = objectives.negative_guidance(concept, anchor, cfg.eta)
            yield from distil.student(base, edits, forget, forget.concept, target, "erase")
            yield from distil.retain(base, edits, keep, cfg)

        trained = objectives.parameters(edits)
        gains = {name: p for name, p in trained.items() if name.endswith(".gain")}
        eraser = {name: p for name, p in trained.items() if name.endswith((".up", ".down"))}
        stages = [("eraser", eraser, cfg)]
        if cfg.modulating:
            later = replace(cfg, steps=cfg.modulating, lr=cfg.modulating_lr)
            stages.append(("modulation", gains, later))
        for stage, params, settings in stages:
            groups = {"weights": Group(params, settings.lr)}
            report.watch(edits)
            about = f"{lesson.concept}: {stage}"
            distil.optimise(base, task, settings, report, groups, sources, terms, about)
        near = lessons.near(
            base, [lesson], report.seed, cfg.keep_prompts, cfg.directions, cfg.power, report
        )
        yield from (replace(edit, gates=(near,)) for edit in edits)


def skips(base: Base) -> dict[str, int]:
    """Layers of the decoder, in order -> how many of the features they read are a skip connection's."""
    found, before = {}, base.unet.config.block_out_channels[-1]
    for number, block in enumerate(base.unet.up_blocks):
        for layer, resnet in enumerate(block.resnets):
            found[f"unet.up_blocks.{number}.resnets.{layer}"] = resnet.in_channels - before
            before = resnet.out_channels
    return found


def erasers(base: Base, rank: int, bins: int, seed: int) -> list[Edit]:
    """A bottleneck at every skip connection and the middle, which adds nothing yet, at full modulation."""
    generator = torch.Generator().manual_seed(seed)
    times = (torch.arange(bins) + 0.5) * TIMES / bins
    middle = base.unet.config.block_out_channels[-1]
    layers, edits = skips(base), []
    places = {site: base.module(site).in_channels for site in layers}
    for site, width in {**places, MIDDLE: middle}.items():
        written = torch.zeros(width, 1)
        written[width - layers.get(site, width) :] = 1  # the decoder's own features stay
        tensors = {
            "down": torch.randn(rank, width, generator=generator) / width**0.5,
            "up": torch.zeros(width, rank),
            "gain": torch.ones(bins, rank),
        }
        tensors = {slot: objectives.parameter(tensor, base) for slot, tensor in tensors.items()}
        tensors["up"].register_hook(lambda grad, own=written: grad * own.to(grad))
        tensors["gain"].register_hook(_alike)
        where = {"reads": "x", "writes": "x"} if site in layers else {"reads": "y"}
        edits.append(Edit("adapter", (site,), {**tensors, "times": times}, {"phi": "gelu", **where}))
    return edits


def _alike(grad: Tensor) -> Tensor:
    """One number a layer and timestep, not one a feature."""
    return grad.mean(1, keepdim=True).expand_as(grad).contiguous()
