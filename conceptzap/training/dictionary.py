"""Sparse autoencoders of what a module gives: trained once for a base, kept beside the cache, or loaded.

BatchTopK (Bussmann, Leask and Nanda 2024, arXiv 2412.06410): f = [W (x - b) + c]_+ of which the k n largest
of n rows stay, x ~ f D + b, trained for |x - x^|^2 / var x and 1/32 of the share of that error which the
strongest of the features that were silent in a batch explain. For use the smallest activation that stays
on the average is a threshold: then a feature depends on its own row of W alone, so that an erasure carries
the rows it needs and not the dictionary. Nothing in it is of a concept, so all concepts share it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor, nn

from conceptzap.base import Base
from conceptzap.edit import canonical_json
from conceptzap.errors import FormatError, MismatchError, ResourceError, escape
from conceptzap.format import atomic, cache
from conceptzap.report import Report
from conceptzap.runtime import adapters
from conceptzap.runtime.attach import installed_on
from conceptzap.training import activations, lessons, objectives, wordings
from conceptzap.training.objectives import Trajectories
from conceptzap.training.train import Group

KIND = "dictionaries"
LAYOUT = 1  # of what is kept; another number lets old ones lie
SILENT = 1 / 32  # weight of what silent features explain
PLACES = 64  # of a picture, at most, that are learned from
# tensors by the names of the published dictionaries (EleutherAI's `sae`)
NAMES = {"encoder": "encoder.weight", "bias": "encoder.bias", "decoder": "W_dec", "center": "b_dec"}


@dataclass(frozen=True)
class Recipe:
    """What a dictionary is made by: `expansion` features a width, `k` of them at a place on the average."""

    expansion: int
    k: int
    steps: int
    rows: int
    pictures: int
    lr: float


@dataclass(frozen=True)
class Dictionary:
    """`encoder` and `decoder` [m, d], `bias` [m], `center` [d]; `threshold` that a feature must exceed."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    center: Tensor
    threshold: float = 0.0

    def weigh(self, x: Tensor) -> Tensor:
        """Every feature of rows x [..., d], before any is left out: [..., m]."""
        return F.relu(F.linear(x - self.center, self.encoder, self.bias))

    def features(self, x: Tensor) -> Tensor:
        """What of that is above the threshold."""
        h = self.weigh(x)
        return torch.where(h > self.threshold, h, 0)

    def rebuild(self, h: Tensor) -> Tensor:
        return h @ self.decoder + self.center


def largest(h: Tensor, k: int) -> Tensor:
    """Of features [n, m] the k n largest, zeros elsewhere."""
    count = min(k * len(h), h.numel())
    top = h.flatten().topk(count, sorted=False)
    return torch.zeros_like(h.flatten()).scatter(0, top.indices, top.values).view_as(h)


# -- where it comes from


def of(
    base: Base, sites: Sequence[str], recipe: Recipe, report: Report, path: str = ""
) -> dict[str, Dictionary]:
    """Site -> the dictionary in the file `path`, else that of this base and recipe, trained if need be.

    What they are learned from is drawn once for all of them. Raises `MismatchError` for one of another
    width, `FormatError` for what is none, and what `train` raises.
    """
    if path:
        return {site: _loaded(base, site, recipe, report, path) for site in sites}
    kept = {site: cache.folder(KIND) / f"{_key(base, site, recipe)}.safetensors" for site in sites}
    missing = [site for site in sites if not kept[site].is_file()]
    data = examples(base, missing, recipe, report) if missing else {}
    for site in missing:
        kept[site].parent.mkdir(parents=True, exist_ok=True)
        write(train(base, site, data.pop(site), recipe, report), kept[site])
        report.note(f"{escape(kept[site])} holds the dictionary of {site}, for every concept")
    return {site: read(kept[site]) for site in sites}


def _loaded(base: Base, site: str, recipe: Recipe, report: Report, path: str) -> Dictionary:
    """One that somebody made; where it says no threshold, with that of the base's own activations."""
    found, width = read(Path(path).expanduser()), adapters.widths(base.module(site)).out
    if len(found.center) != width:
        message = f"the dictionary is of {len(found.center)} features, {site} gives {width}"
        raise MismatchError(message, "name the module that it was made for")
    if found.threshold:
        return found
    return _with_threshold(found, examples(base, [site], recipe, report)[site], recipe)


def _key(base: Base, site: str, recipe: Recipe) -> str:
    about = {
        "base": base.fingerprint((site,)), "dtype": str(base.dtype), "layout": LAYOUT,
        "prediction": base.prediction, "site": site, **asdict(recipe),
    }  # fmt: skip
    if under := sorted(edit.name for edit in installed_on(base)):
        about["installed"] = under  # what is learned under them is of no use without
    return hashlib.sha256(canonical_json(about).encode()).hexdigest()[:24]


def read(path: Path) -> Dictionary:
    try:
        tensors = parse(path.read_bytes())
        parts = {name: tensors[stored].float() for name, stored in NAMES.items()}
    except OSError as error:
        message = f"cannot read {escape(path)}: {error.strerror}"
        raise ResourceError(message, "name a file of a dictionary") from error
    except (SafetensorError, KeyError) as error:
        names = ", ".join(NAMES.values())
        raise FormatError(f"{escape(path)} is no dictionary", f"it needs {names} as safetensors") from error
    (m, d), shapes = parts["encoder"].shape, {name: tuple(part.shape) for name, part in parts.items()}
    if shapes != {"encoder": (m, d), "bias": (m,), "decoder": (m, d), "center": (d,)}:
        raise FormatError(f"the tensors of {escape(path)} do not fit each other", "make it again")
    return Dictionary(**parts, threshold=tensors["threshold"].item() if "threshold" in tensors else 0.0)


def write(made: Dictionary, path: Path) -> None:
    tensors = {stored: getattr(made, name).contiguous() for name, stored in NAMES.items()}
    tensors["threshold"] = torch.tensor(made.threshold)
    atomic.write_atomic(path, serialise(tensors), True)


# -- training


def prompts(base: Base) -> list[str]:
    """What is drawn for a dictionary: every word of the presets that the base knows, in every wording."""
    asked: dict[str, None] = {}
    for kind in wordings.WORDED:
        words = [word for word in lessons.usual_keep([kind]) if not base.unknown_words(word)]
        things = [t for t in wordings.wording(kind)["things"] if not base.unknown_words(t)]
        asked |= dict.fromkeys(wordings.keep(words, kind, things))
    known = [prompt for prompt in asked if not base.unknown_words(prompt)]
    return known or [""]


def examples(
    base: Base, sites: Sequence[str], recipe: Recipe, report: Report
) -> dict[str, Tensor]:
    """Site -> rows [n, d] of what it gives while the base draws, of every timestep, on the CPU."""
    fixed = copy.copy(report)
    fixed.seed = 0  # a dictionary is the base's, whatever is erased with which seed
    drawn = Trajectories.kept(base, prompts(base), recipe.pictures, fixed)
    rows: dict[str, list[Tensor]] = {site: [] for site in sites}
    for step, found in enumerate(activations.along(base, drawn, sites, fixed)):
        for site, x in found.items():  # [pictures, places, d]
            chosen = torch.randperm(x.shape[1], generator=objectives.step_generator(0, step))
            rows[site].append(x[:, chosen[:PLACES]].flatten(0, 1))
    return {site: torch.cat(each) for site, each in rows.items()}


def train(base: Base, site: str, data: Tensor, recipe: Recipe, report: Report) -> Dictionary:
    """A dictionary of rows [n, d] of what the module gives; raises what `train.train` raises."""
    mean = data.mean(0)
    scale = data.shape[1] ** 0.5 / (data - mean).norm(dim=1).mean().clamp_min(1e-12)
    data = ((data - mean) * scale).to(base.device)
    parameters = _begun(recipe.expansion * data.shape[1], data.shape[1], base)
    variance = data.var(0).sum()

    def losses(step: int, part: int, parts: int) -> Iterator[tuple[str, Tensor, str]]:
        generator = objectives.step_generator(0, step)
        which = torch.randint(len(data), (recipe.rows,), generator=generator)
        which = which[recipe.rows * part // parts : recipe.rows * (part + 1) // parts]
        yield from _losses(_unit(parameters), data[which], recipe, variance, len(which) / recipe.rows)

    groups = {"dictionary": Group(parameters, recipe.lr)}
    about = {**asdict(recipe), "site": site}
    objectives.optimise(
        base, groups, losses, report, steps=recipe.steps, batch=recipe.rows, about=about
    )
    made = _with_threshold(_unit(parameters, detach=True), data.cpu(), recipe)
    return Dictionary(
        made.encoder * scale, made.bias, made.decoder / scale, made.center / scale + mean, made.threshold
    )


def _begun(m: int, d: int, base: Base) -> dict[str, nn.Parameter]:
    """Encoder and decoder the same random directions, as in the published code."""
    rows = F.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(0)), dim=1)
    tensors = {"encoder": rows, "bias": torch.zeros(m), "decoder": rows, "center": torch.zeros(d)}
    return {name: objectives.parameter(tensor.clone(), base) for name, tensor in tensors.items()}


def _unit(parameters: dict[str, nn.Parameter], detach: bool = False) -> Dictionary:
    """The dictionary of the parameters, its decoder's rows of unit length."""
    parts = {name: p.detach().cpu() if detach else p for name, p in parameters.items()}
    return Dictionary(**parts | {"decoder": F.normalize(parts["decoder"], dim=1)})


def _losses(
    made: Dictionary, x: Tensor, recipe: Recipe, variance: Tensor, share: float
) -> Iterator[tuple[str, Tensor, str]]:
    weighed = made.weigh(x)  # [n, m]
    kept = largest(weighed, recipe.k)
    error = x - made.rebuild(kept)
    loss = error.pow(2).sum(1).mean() / variance
    silent = weighed.masked_fill((kept > 0).any(0), 0)
    explained = largest(silent, recipe.k) @ made.decoder
    loss = loss + SILENT * (error.detach() - explained).pow(2).sum(1).mean() / variance
    yield "unexplained", loss * share, "dictionary"


@torch.no_grad()
def _with_threshold(made: Dictionary, data: Tensor, recipe: Recipe) -> Dictionary:
    """With the mean over batches of the smallest activation that stays."""
    least = []
    for rows in data.split(recipe.rows):
        kept = largest(made.weigh(rows), recipe.k)
        least.append(kept[kept > 0].min() if (kept > 0).any() else kept.new_zeros(()))
    threshold = torch.stack(least).mean().item()
    return Dictionary(made.encoder, made.bias, made.decoder, made.center, threshold)
