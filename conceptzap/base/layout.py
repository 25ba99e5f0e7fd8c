"""What a checkpoint folder must hold, and what is refused before it is opened. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conceptzap.errors import (
    ConceptZapError,
    MismatchError,
    ResourceError,
    escape,
    ran_out_of_memory,
)
from conceptzap.words import with_article

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
PIPELINES = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
}
# channels that a UNet reads beside 4 of latents -> what its pipeline is for; 1 more is depth
KINDS = {0: "", 4: "InstructPix2Pix", 5: "Inpaint"}
BESIDE = (*KINDS, 1)
# component -> classes it may be of; all else would be code or an architecture we do not know
CLASSES = {
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL"},
    "text_encoder": {"CLIPTextModel"},
    "text_encoder_2": {"CLIPTextModelWithProjection"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "tokenizer_2": {"CLIPTokenizer", "CLIPTokenizerFast"},
}
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
USABLE = "use a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
NO_CROSS_ATTENTION = (
    "text and picture share one attention there, so it has no cross-attention text layers to edit"
)
NO_TEXT = "no text encoder of its own, like SDXL's refiner or a part of a pipeline"
AGAIN = "get the checkpoint again"
CONVERT = "a pickle can run code and is never read; convert it to .safetensors elsewhere"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a library raises on a broken checkpoint becomes one `ResourceError` line."""
    try:
        yield
    except ConceptZapError:
        raise
    # a broken file makes third-party loaders raise anything from KeyError to RuntimeError
    except Exception as error:
        if ran_out_of_memory(error):
            hint = "close something else"
            raise ResourceError(f"not enough memory to load {what}", hint) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ResourceError(f"{what} cannot be read: {reason}", AGAIN) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `ResourceError` when there is none."""
    with reading(str(path)):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ResourceError(f"{path} cannot be read: no JSON object", AGAIN)
    return value


def check_index(index: dict[str, Any], name: str) -> list[str]:
    """The components to load for a model_index.json, unless it is of a kind that cannot be used."""
    kind = index.get("_class_name")
    if "transformer" in index or "prior" in index:
        raise MismatchError(f"{name} is {with_article(str(kind))}: {NO_CROSS_ATTENTION}", USABLE)
    if not isinstance(kind, str) or kind not in PIPELINES:
        what = with_article(escape(str(kind)))
        raise MismatchError(f"{name} is {what}, which conceptzap cannot edit", USABLE)
    wanted = [part for part in CLASSES if not part.endswith("_2") or "XL" in kind]
    for part in wanted:
        entry = index.get(part)
        library, cls = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if cls is None and part == "text_encoder" and entry in (None, [None, None]):
            raise MismatchError(f"{name} has {NO_TEXT}", USABLE)
        if library not in ("diffusers", "transformers") or cls not in CLASSES[part]:
            found = f"{library}.{cls}" if library else "nothing"
            raise MismatchError(
                f"{name} names {found} as its {part}, not {' or '.join(sorted(CLASSES[part]))}",
                f"code that comes with a checkpoint is never run; {USABLE}",
            )
    return wanted


def zeros_negative(config: Mapping[str, Any], family: str) -> bool:
    """Whether no negative prompt is zeros to a pipeline of this config, as SDXL's is by default."""
    return family == "sdxl" and bool(config.get("force_zeros_for_empty_prompt", True))


def _patterns(stem: str, variant: str) -> re.Pattern[str]:
    shard = r"-\d+-of-\d+"
    return re.compile(
        rf"{stem}{variant}({shard})?\.safetensors|{stem}{shard}{variant}\.safetensors"
        rf"|{stem}\.safetensors\.index{variant}\.json"
    )


def weight_files(names: Iterable[str], component: str, base: str) -> tuple[str | None, list[str]]:
    """The variant (None or "fp16") and the safetensors files among the file names of a component.

    Raises `ResourceError` when there is none, and says so when there are only pickles.
    """
    names = sorted(names)
    for variant in (None, "fp16"):
        pattern = _patterns(WEIGHTS[component], rf"\.{variant}" if variant else "")
        if found := [name for name in names if pattern.fullmatch(name)]:
            return variant, found
    if any(name.endswith(PICKLES) for name in names):
        raise ResourceError(f"the {component} of {base} comes as a pickle only", CONVERT)
    raise ResourceError(f"{base} has no weights for its {component}", AGAIN)


def check_tokenizer(folder: Path, component: str) -> None:
    """Raise `ResourceError` unless a tokenizer's folder holds its words.

    Without them it would be built all the same, and take every prompt for the same unknown word.
    """
    place = folder / component
    if not any(all((place / name).is_file() for name in names) for names in VOCABULARIES):
        raise ResourceError(f"{place} has no vocabulary", AGAIN)


def check_component(folder: Path, component: str) -> str | None:
    """The variant of a component's weights, once its folder is sound: safetensors only."""
    place = folder / component
    config = read_json(place / "config.json")
    if "quantization_config" in config or (place / "adapter_config.json").exists():
        raise MismatchError(f"the {component} of {folder.name} is quantised or an adapter", USABLE)
    names = [path.name for path in place.iterdir()]
    variant, files = weight_files(names, component, str(folder))
    for index in (place / name for name in files if name.endswith(".json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or any(shard not in files for shard in shards.values()):
            raise ResourceError(f"{index} names weights that are not there", AGAIN)
    return variant
