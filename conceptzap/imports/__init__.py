"""Imports: somebody else's file -> edits. A member has `claims`, `concepts` and `edits`.

`claims(found)` says whether a file is of this format, by its keys and labels alone; no two members claim
one file. `concepts(found)` are the names that the file says it erases, none where it does not say.
`edits(found, base, task, report)` are its edits on that base, of all that is in it: where a key does not
fit, `MismatchError` names it and nothing is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from conceptzap.base import Base, find_module, names, parameters
from conceptzap.base.layout import PICKLES
from conceptzap.base.modules import is_text
from conceptzap.base.original import UNET_PREFIX
from conceptzap.edit import Edit, Json
from conceptzap.errors import (
    FormatError,
    MismatchError,
    ResourceError,
    UsageError,
    escape,
)
from conceptzap.format import container
from conceptzap.registry import family

CLOSE = 1e-3  # what a file may lose of its change, as a share of it, when it is stored in half precision
SHOWN = 3  # keys that an error names
ANOTHER = "it was made for another architecture, or is no erasure of this kind; see --base and --format"
CONVERT = (
    "a pickle can run code and is never read; convert it where you trust it: safetensors.torch.save_file("
    'torch.load("in.pt", weights_only=True), "out.safetensors")'
)
DAMAGED = "get the file again"
LARGEST = 1e18  # a number whose square is finite, too
DEQUANTISE = "export it in half precision where it comes from"
CONVERTED = "save it as a plain LoRA first: PEFT's path_initial_model_for_weight_conversion"
MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # what PEFT begins with and takes from the base
WEIGHTS, PEFT = "adapter_model.safetensors", "adapter_config.json"  # in a PEFT folder
# what a key of a LoRA ends in: kohya's, then diffusers' and PEFT's, then diffusers' older ones
PART = re.compile(r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<part>up|down|A|B)(?:\.default)?\.weight")
ALPHA = ".alpha"
GATE = "attention_gate."  # before what CPE adds to its pairs
PREFIXES = ("base_model.model.", "unet.")


@dataclass(frozen=True)
class Found:
    """Somebody else's file as it was read: labels, tensors, and what stood beside it (PEFT's config)."""

    path: Path
    labels: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Json] = field(default_factory=dict)


def read(path: Path) -> Found:
    """A .safetensors file, or a PEFT folder, read whole.

    Raises `FormatError` for a pickle or what is no safetensors file, `UsageError` for an erasure of ours.
    """
    path = path / WEIGHTS if path.is_dir() else path
    if path.suffix.lower() in PICKLES:
        raise FormatError(f"{escape(path)} is a pickle", CONVERT)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: _wide(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
            labels = file.metadata() or {}
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ResourceError(f"cannot read {escape(path)}: {reason}", "name a file to import") from error
    except SafetensorError as error:
        what, hint = container.what_is(path.read_bytes()[:4096])
        hint = CONVERT if hint == container.NO_PICKLE else "get the file again"
        raise FormatError(f"{escape(path)} is {what}", hint) from error
    if labels.get("format", "").startswith("lprompt/"):
        raise UsageError(f"{escape(path)} is an erasure already", "use it as it is: generate --with")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.numel() != 1:
            raise FormatError(f"{escape(path)} holds no real numbers in {escape(key)}", DEQUANTISE)
        if not bool((tensor.float().abs() < LARGEST).all()):
            text = f"{escape(path)} holds numbers that are not finite or out of all reason, in {escape(key)}"
            raise FormatError(text, DAMAGED)
    return Found(path, labels, tensors, _config(path, labels))


def _wide(tensor: Tensor) -> Tensor:
    """As it is; numbers of eight bits, which torch hardly computes with, in sixteen, which hold them."""
    return tensor.half() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _config(path: Path, labels: Mapping[str, str]) -> dict[str, Json]:
    """PEFT's config: beside its own file, or by diffusers among the labels, its parts then by prefix."""
    beside = path.with_name(PEFT)
    text, place = labels.get("lora_adapter_metadata", "{}"), path
    try:
        if path.name == WEIGHTS and beside.is_file():
            text, place = beside.read_text(encoding="utf-8"), beside
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"the configuration in {escape(place)} cannot be read", DAMAGED) from error
    if not isinstance(config, dict):
        raise FormatError(f"the configuration in {escape(place)} is no table", DAMAGED)
    for key, value in config.items():
        if key.endswith("init_lora_weights") and str(value).lower().startswith(MOVING):
            raise FormatError(f"{escape(place)} begins from weights changed by {escape(value)}", CONVERTED)
    return config


def format_of(found: Found) -> str:
    """The one format that claims the file; raises `FormatError` where none does."""
    known = family.members("imports")
    for name in known:
        if family.load("imports", name).claims(found):
            return name
    keys = ", ".join(map(escape, sorted(found.tensors)[:SHOWN])) or "nothing"
    raise FormatError(
        f"{escape(found.path)} is of no format that can be imported: it holds {keys}",
        f"known: {', '.join(known)}",
    )


def refuse(
    found: Found, base: Base, keys: Sequence[str], why: str = "do not fit", hint: str = ANOTHER
) -> NoReturn:
    """Raise a `MismatchError` that names the first of these keys."""
    shown = ", ".join(map(escape, sorted(keys)[:SHOWN])) + (", ..." if len(keys) > SHOWN else "")
    text = f"{len(keys)} of {len(found.tensors)} keys of {escape(found.path.name)} {why} {base.id}: {shown}"
    raise MismatchError(text, hint)


# -- pairs of factors


class Factors(NamedTuple):
    """A change up down of one weight, the alpha folded in: up [out, r], down [r, in times kernel]."""

    up: Tensor
    down: Tensor


def is_lora(found: Found) -> bool:
    return any(map(PART.fullmatch, found.tensors))


def names_prompts(found: Found) -> bool:
    """Whether the labels are those of SPM and what followed it: the prompts that are erased, rank, alpha."""
    return {"prompts", "rank", "alpha"} <= found.labels.keys()


def prompts(found: Found) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, found.labels.get("prompts", "").split(","))))


def pairs(found: Found, base: Base) -> list[Edit]:
    """An edit for each pair of factors that changes anything.

    Refused are layers that this base does not have, halves of pairs, other shapes, and whatever is neither
    a factor nor an alpha (magnitudes of DoRA, factors of LoHa and LoKr).
    """
    known, parts = names.layers(base), {}
    strange, twice = [], []
    for key in found.tensors:
        name, part = _split(key)
        site = known.get(name)
        if site is None or not part:
            strange.append(key)
        elif key != parts.setdefault(site, {}).setdefault(part, key):
            twice.append(key)
    if strange:
        refuse(found, base, strange, "have no place in")
    if twice:
        refuse(found, base, twice, "are there by another name, too, for")
    halves = [key for keys in parts.values() if not {"up", "down"} <= keys.keys() for key in keys.values()]
    if halves:
        refuse(found, base, halves, "are one half of a pair for")
    edits = [_pair(found, base, site, keys) for site, keys in parts.items()]
    return changing(found, [edit for edit in edits if edit is not None])


def _split(key: str) -> tuple[str, str]:
    """The layer that a key is of, without prefixes, and its part: up, down, `.alpha` or ""."""
    match = PART.fullmatch(key)
    layer = match["layer"] if match else key.removesuffix(ALPHA)
    part = {"A": "down", "B": "up"}.get(match["part"], match["part"]) if match else ""
    for prefix in PREFIXES:
        layer = layer.removeprefix(prefix)
    layer, old = re.subn(r"\.processor\.", ".", layer)
    if old and layer.endswith(".to_out"):
        layer += ".0"
    return layer, part or (ALPHA if key.endswith(ALPHA) else "")


def _pair(found: Found, base: Base, site: str, keys: Mapping[str, str]) -> Edit | None:
    """The edit at one layer; None where it changes nothing."""
    module = find_module(base, site)
    out, into, *kernel = module.weight.shape
    up, down = (found.tensors[keys[part]].float() for part in ("up", "down"))
    rank = down.shape[0] if down.ndim else 0
    # a 1 x 1 convolution and a Linear are written alike
    same = _bare(up.shape) == (out, rank) and _bare(down.shape) == _bare((rank, into, *kernel))
    if not (same and rank):
        refuse(found, base, list(keys.values()), "have another shape than in")
    scale = _scale(found, site, rank, keys.get(ALPHA))
    factors = balanced(scale * up.reshape(out, rank), down.reshape(rank, -1))
    if not len(factors.down):
        return None
    shapes = {"up": (*(1 for _ in kernel),), "down": (into, *kernel)}
    tensors = {
        "up": factors.up.reshape(out, -1, *shapes["up"]),
        "down": factors.down.reshape(-1, *shapes["down"]),
    }
    return Edit("weight", (site,), stored(tensors))


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape, [out, in, *kernel], without a kernel of 1 x 1."""
    return tuple(shape[:2] if set(shape[2:]) <= {1} else shape)


def _scale(found: Found, site: str, rank: int, key: str | None) -> float:
    """alpha / rank: by the layer's own alpha under `key`, by the config beside or inside the file, or 1."""
    if key is not None and found.tensors[key].numel() != 1:
        raise FormatError(f"{escape(key)} in {escape(found.path)} is not one number", DAMAGED)
    if key is not None:
        return float(found.tensors[key]) / rank
    name = names.of_text(site) if is_text(site) else site
    part, _, path = name.partition(".")
    config = found.config
    if found.path.name != WEIGHTS:  # by diffusers: of all parts in one
        config = {k.removeprefix(f"{part}."): v for k, v in config.items() if k.startswith(f"{part}.")}
    try:
        patterns = config.get("alpha_pattern") or {}
        # as PEFT finds them: an end of the path, or a pattern of one
        own = [value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", path)]
        alpha = float((own or [config.get("lora_alpha", rank)])[0])
        if not abs(alpha) < LARGEST:
            raise ValueError(alpha)
    except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
        text = f"the alpha of {escape(path)} in {escape(found.path)} is no number"
        raise FormatError(text, DAMAGED) from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def balanced(up: Tensor, down: Tensor) -> Factors:
    """The same change with both halves of each component of one size; components of size 0 go.

    A half that is tiny would be lost in half precision, however large the other one is.
    """
    sizes = up.norm(dim=0), down.norm(dim=1)  # [r]
    kept = sizes[0] * sizes[1] > 0
    ratio = (sizes[1][kept] / sizes[0][kept]).sqrt()
    return Factors(up[:, kept] * ratio, down[kept] / ratio[:, None])


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp16 where a tensor loses no more than `CLOSE` of itself by it, else fp32."""
    return {slot: _stored(tensor) for slot, tensor in tensors.items()}


def _stored(tensor: Tensor) -> Tensor:
    half = tensor.half().contiguous().cpu()
    lost = (half.float() - tensor.float().cpu()).norm()
    return half if lost <= CLOSE * tensor.norm().cpu() else tensor.float().contiguous().cpu()


def changing(found: Found, edits: list[Edit]) -> list[Edit]:
    """The edits; `MismatchError` where there are none, `FormatError` for numbers past all bounds."""
    if not edits:
        raise MismatchError(f"{escape(found.path)} changes nothing", "it was not trained, or for this base")
    for edit in edits:
        if not all(bool(tensor.isfinite().all()) for tensor in edit.tensors.values()):
            text = f"what {escape(found.path)} changes at {edit.sites[0]} is not finite"
            raise FormatError(text, DAMAGED)
    return edits


# -- weights as a whole


BLOCKS = re.compile(
    r"((down|up)_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding"
    r"|(input|output)_blocks|middle_block|time_embed|label_emb|out)\."
)
KEYS_VALUES = re.compile(r".*attn2\.to_[kv]\.weight")
LARGEST_RANK = 64  # above it a change is kept whole


def is_weights(found: Found) -> bool:
    """Whether these are weights of a UNet by their own names."""
    lora = is_lora(found)
    return bool(found.tensors) and not lora and all(BLOCKS.match(plain(key)) for key in found.tensors)


def are_keys_values(found: Found) -> bool:
    """Whether they are those of cross-attention's keys and values alone."""
    return is_weights(found) and all(map(KEYS_VALUES.fullmatch, found.tensors))


def plain(key: str) -> str:
    """A weight's name without what some write before it."""
    for prefix in (UNET_PREFIX, "unet."):
        key = key.removeprefix(prefix)
    return key


class Change(NamedTuple):
    """What a file makes of one parameter: new - old in fp32, and how much of it may be rounding."""

    name: str
    value: Tensor
    rounding: float


def changes(found: Found, base: Base) -> Iterator[Change]:
    """The parameters that are others in the file than in the base, those that differ by rounding left out."""
    own, known = dict(parameters(base.unet)), names.weights(base.unet)
    strange = [key for key in found.tensors if plain(key) not in known]
    if strange:
        refuse(found, base, strange, "have no place in")
    other = [key for key, t in found.tensors.items() if t.shape != own[known[plain(key)]].shape]
    if other:
        refuse(found, base, other, "have another shape than in")
    for key, tensor in sorted(found.tensors.items()):
        name = known[plain(key)]
        old = own[name].detach().cpu()
        if tensor.equal(old.to(tensor.dtype)) or old.equal(tensor.to(old.dtype)):
            continue
        coarse = max(torch.finfo(dtype).eps for dtype in (tensor.dtype, old.dtype))
        rounding = coarse / 2 * tensor.float().norm().item()
        yield Change(name, tensor.float() - old.float(), rounding)


def edits_of(found: Found, base: Base, changed: Iterable[Change]) -> list[Edit]:
    """An edit for each changed weight, a pair of factors where that is exact, and for each changed bias.

    A bias is an adapter that reads nothing: y + up (0 y + 1).
    """
    edits, strange = [], []
    for change in changed:
        path, _, kind = change.name.rpartition(".")
        module = find_module(base.unet, f"unet.{path}")
        if not isinstance(module, nn.Linear | nn.Conv2d):
            strange.append(change.name)
        elif kind == "bias":
            out = len(change.value)
            size = change.value.abs().max()
            tensors = {
                "up": change.value[:, None] / size,
                "down": torch.zeros(1, out),
                "bias": size[None],
            }
            edits.append(Edit("adapter", (f"unet.{path}",), stored(tensors), {"reads": "y"}))
        else:
            edits.append(Edit("weight", (f"unet.{path}",), stored(_compact(change))))
    if strange:
        refuse(found, base, strange, "are changed where no edit can be in", "only layers can be edited")
    return changing(found, edits)


def _compact(change: Change) -> dict[str, Tensor]:
    """`up`, `down` where what they leave is no more than rounding, else the whole `delta`."""
    flat = change.value.flatten(1)  # [out, in times kernel]
    rank = min(LARGEST_RANK, min(flat.shape) // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, sizes, v = torch.svd_lowrank(flat, q=rank, niter=4)
    allowed = max(change.rounding, CLOSE * flat.norm().item())
    if (flat - (u * sizes) @ v.T).norm() > allowed:
        return {"delta": change.value}
    # the fewest components that leave no more than that
    left = (flat.square().sum() - sizes.square().cumsum(0)).clamp(min=0).sqrt()
    rank = int((left > allowed).sum()) + 1
    root = sizes[:rank].sqrt()
    kernel = change.value.shape[2:]
    up, down = u[:, :rank] * root, root[:, None] * v[:, :rank].T
    return {
        "up": up.reshape(*up.shape, *(1 for _ in kernel)),
        "down": down.reshape(rank, -1, *kernel),
    }
