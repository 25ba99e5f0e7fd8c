"""Checkpoints from the Hugging Face hub: what is needed, as safetensors, one line when offline."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from conceptzap.base import layout
from conceptzap.errors import ConceptZapError, ResourceError

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
PATIENCE = 10  # seconds for the first answer
PLAIN = ["model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*"]


def fetch(name: str) -> tuple[Path, str]:
    """The local folder of hub id `owner/name[@revision]`, and its commit; kept in the hub's cache.

    Raises `ResourceError` when it does not exist, is closed, comes as pickle, or cannot be reached
    and is not in the cache; `MismatchError` before anything big is downloaded.
    """
    match = NAME.fullmatch(name)
    repo, revision = match["repo"], match["revision"]
    with _answering(name):
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=PATIENCE)
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        # no network shows as any of a dozen exceptions of two HTTP libraries
        except Exception:
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


@contextmanager
def _answering(name: str) -> Iterator[None]:
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except ConceptZapError:
        raise
    except GatedRepoError as error:
        raise ResourceError(
            f"{name} is closed to you", "accept its terms on the hub and run: hf auth login"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ResourceError(f"the hub has no {name}", "check its spelling and revision") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ResourceError(f"{name} could not be fetched: {reason}", "try again") from error
    finally:
        log.setLevel(level)
