"""What lies on a disk: erasures, whole folders of them, checkpoints and LoRAs. Torch for checkpoints only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conceptzap import format
from conceptzap.edit import Json
from conceptzap.errors import FormatError, ResourceError, escape
from conceptzap.format import naming
from conceptzap.words import with_article

INDEX = "model_index.json"
NOTE = "conceptzap.json"  # what `export` leaves in a folder, and a file has in its metadata
IN_METADATA = "conceptzap"
LARGEST_HEADER = 100 * 2**20  # bytes; safetensors' own limit
# how the original names begin -> the part
PARTS = {
    "model.diffusion_model.": "unet", "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder", "conditioner.": "text_encoder",
}  # fmt: skip
TEXT = ("lora_te", "text_encoder")  # how a LoRA calls what it changes there
SHOWN = 3  # erasures that a hint names


@dataclass(frozen=True)
class Model:
    """A checkpoint or a LoRA, as far as it can be told without loading it.

    `kind`: checkpoint or LoRA. `family` sd1, sd2 or sdxl and `prediction` epsilon or v_prediction, ""
    where it does not say. `parts`: bytes of each; of a LoRA by the part that it changes. `erased`:
    what our `export` says went in, {} in any other.
    """

    path: Path
    bytes: int
    kind: str
    family: str
    prediction: str
    parts: Mapping[str, int]
    erased: Mapping[str, Json]


def among(path: Path) -> list[Path]:
    """A folder of erasures as its files, by name; anything else as it is."""
    path = naming.existing(path)
    if not path.is_dir() or (path / INDEX).is_file():
        return [path]
    return erasures_in(path) or [path]


def erasures_in(folder: Path) -> list[Path]:
    """The files of a folder that are called like erasures, by name."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(naming.SUFFIX))
    except OSError as error:
        raise ResourceError(f"cannot list {escape(folder)}", "name a folder that can be read") from error
    return [folder / name for name in names if not name.startswith(".")]


def examine(path: Path | str) -> tuple[format.Info | Model, ...]:
    """What lies at a path: an erasure, a checkpoint, a LoRA, or every erasure of a folder.

    Erasures are verified like `inspect`; checkpoints and LoRAs are told by their headers alone, with
    what an export of ours has erased in them. Raises `FormatError` for what is none of these,
    `MismatchError` and `ResourceError` for checkpoints that could not be used.
    """
    return tuple(examine_one(one) for one in among(Path(path)))


def examine_one(path: Path) -> format.Info | Model:
    """What one path holds; raises `FormatError` for what is neither erasure, checkpoint nor LoRA."""
    path = naming.existing(path)
    if (path / INDEX).is_file():
        return _folder(path)
    try:
        return format.read_header(path)
    except FormatError as error:
        entries, said = _header(path) if path.is_file() else ({}, {})
        if said.get("format", "").startswith("lprompt/") or not entries:
            raise  # a broken erasure, or no safetensors at all
        found = _lora(path, entries, said) or _file(path, entries, said)
        if found is None:
            raise error
        return found


def offer(folder: Path) -> str:
    """What could be drawn with the erasures of a folder, as a command; "" where there are none."""
    known = []
    with suppress(ResourceError):
        for path in erasures_in(folder)[:SHOWN]:
            with suppress(FormatError):
                known.append((naming.bare(path.name), format.read_header(path).header))
    if not known:
        return ""
    name, header = known[0]
    concept = header.concepts[0] if header.concepts else "cat"
    kinds: Any = header.made[0].get("kinds") if header.made else None
    prompt = f"a cat by {concept}" if kinds and kinds[0] == "style" else with_article(concept)
    here = ", ".join(name for name, _ in known)
    command = f"conceptzap generate {json.dumps(escape(prompt))} --with {escape(name)} --compare"
    return f"here: {escape(here)}; for example: {command}"


# checkpoints


def _folder(path: Path) -> Model:
    """A diffusers folder: its index, configs and the sizes of its weights."""
    from conceptzap.base import layout, loading

    index = layout.read_json(path / INDEX)
    parts = layout.check_index(index, escape(path))
    config = layout.read_json(path / "unet" / "config.json")
    wanted = {"cross_attention_dim": None, "use_linear_projection": False, **config}
    encoders: Any = tuple(part for part in parts if part.startswith("text_encoder"))
    scheduler = path / "scheduler" / "scheduler_config.json"
    said = layout.read_json(scheduler) if scheduler.is_file() else {}
    sizes = {part: _weights(path / part) for part in layout.WEIGHTS if part in parts}
    note = layout.read_json(path / NOTE) if (path / NOTE).is_file() else {}
    family = loading.family_of(SimpleNamespace(**wanted), encoders)
    prediction = str(said.get("prediction_type", "epsilon"))
    return Model(path, sum(sizes.values()), "checkpoint", family, prediction, sizes, _told(note))


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def _file(path: Path, entries: Mapping[str, Any], said: Mapping[str, str]) -> Model | None:
    """A checkpoint in one file; None where it is none, an error where it is one we cannot use."""
    from conceptzap.base import single_file

    if not any(name.startswith("model.diffusion_model.") for name in entries):
        return None
    found = single_file.sketch(path)
    usual = "" if found.family == "sd2" else "epsilon"
    sizes = _sizes(entries, lambda name: next((p for p in PARTS if name.startswith(p)), ""))
    sizes = {PARTS[prefix]: count for prefix, count in sizes.items() if prefix}
    told = _told(_json(said.get(IN_METADATA, "")))
    prediction = found.prediction or usual
    return Model(path, path.stat().st_size, "checkpoint", found.family, prediction, sizes, told)


# LoRAs


def _lora(path: Path, entries: Mapping[str, Any], said: Mapping[str, str]) -> Model | None:
    """A LoRA, by the names of its tensors: kohya's, diffusers' or peft's; None where it is none."""
    if not any("lora" in name.lower() for name in entries):
        return None
    version = said.get("ss_base_model_version", "") + said.get("modelspec.architecture", "")
    marks = {"sdxl": ("xl",), "sd2": ("sd_v2", "-v2"), "sd1": ("sd_v1", "-v1")}
    family = next((one for one, some in marks.items() if any(m in version for m in some)), "")
    sizes = _sizes(entries, lambda key: "text_encoder" if key.startswith(TEXT) else "unet")
    told = _told(_json(said.get(IN_METADATA, "")))
    return Model(path, path.stat().st_size, "LoRA", family, "", sizes, told)


# headers


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensor entries and metadata of a safetensors file, whose values are not read; empty for others."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = _json(file.read(length)) if 1 < length <= LARGEST_HEADER else {}
    except OSError:
        return {}, {}
    said = data.pop("__metadata__", None)
    entries = {name: one for name, one in data.items() if isinstance(one, dict)}
    texts = said.items() if isinstance(said, dict) else ()
    return entries, {key: value for key, value in texts if isinstance(value, str)}


def _json(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is; {} for anything else."""
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    return {}


def _sizes(entries: Mapping[str, Any], part: Callable[[str], str]) -> dict[str, int]:
    """Bytes of the tensors by what `part` says of a name."""
    sizes: dict[str, int] = {}
    for name, one in entries.items():
        start, end = _span(one.get("data_offsets"))
        sizes[part(name)] = sizes.get(part(name), 0) + end - start
    return dict(sorted(sizes.items()))


def _span(found: Any) -> tuple[int, int]:
    whole = isinstance(found, list) and len(found) == 2 and all(type(one) is int for one in found)
    return (found[0], found[1]) if whole else (0, 0)


def _told(note: Mapping[str, Any]) -> dict[str, Json]:
    """What an export says of itself, as far as it is of the kinds that it should be."""
    kinds = {"concepts": str, "anchors": (str, type(None)), "erasures": dict}
    return {
        key: list(value)
        for key, kind in kinds.items()
        if isinstance(value := note.get(key), list) and all(isinstance(one, kind) for one in value)
    }
