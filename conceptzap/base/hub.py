"""Checkpoints from the Hugging Face hub: what is needed, as safetensors, one line when offline."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import (
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)

from conceptzap.base import layout
from conceptzap.errors import ResourceError
from conceptzap.registry.hub import PATIENCE, REVISION, answering, is_answer

NAME = re.compile(rf"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>{REVISION}))?")
PLAIN = ["model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*"]


def fetch(name: str) -> tuple[Path, str]:
    """The local folder of hub id `owner/name[@revision]`, and its commit; kept in the hub's cache.

    Raises `ResourceError` when it does not exist, is closed, comes as pickle, or cannot be reached
    and is not in the cache; `MismatchError` before anything big is downloaded.
    """
    match = NAME.fullmatch(name)
    repo, revision = match["repo"], match["revision"]
    with answering(name):
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=PATIENCE)
        except Exception as error:
            if is_answer(error):
                raise
            return _cached(name, repo, revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        patterns = _wanted(repo, info.sha, names)
        # by the branch, so that the cache keeps what it stood for when the hub was last reached
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns)
        return Path(folder), Path(folder).name


def _cached(name: str, repo: str, revision: str | None) -> tuple[Path, str]:
    """What was fetched before. Not by the hub's own rule: it misses the files never asked for."""
    index = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    if not isinstance(index, str):
        raise ResourceError(
            f"{name} is no folder here, not in the cache, and the hub cannot be reached",
            "give the path of a folder or .safetensors file, or go online",
        )
    return Path(index).parent, Path(index).parent.name


def _wanted(repo: str, commit: str, names: list[str]) -> list[str]:
    """Configs, tokenizers and one set of weights per component."""
    if "model_index.json" not in names:
        raise ResourceError(f"{repo} is no diffusers checkpoint", layout.USABLE)
    index = layout.read_json(Path(hf_hub_download(repo, "model_index.json", revision=commit)))
    patterns = list(PLAIN)
    for component in layout.check_index(index, repo):
        if component in layout.WEIGHTS:
            inside = [n.split("/", 1)[1] for n in names if n.startswith(f"{component}/")]
            files = layout.weight_files(inside, component, repo)[1]
            patterns += [f"{component}/{file}" for file in ("config.json", *files)]
    return patterns
