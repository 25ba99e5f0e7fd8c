"""The words nearest to a concept by text: its synonyms, and the neighbours that must stay.

A word's vector is the state at its end of text, one for each text encoder, centred over the words.
The words are the base's own vocabulary where that is small, else common nouns, and what the presets
list. Their vectors depend on the text encoders alone, so they are kept in the cache: the second
concept costs nothing.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptzap.base import Base, bpe
from conceptzap.edit import canonical_json
from conceptzap.errors import ConceptZapError
from conceptzap.format import atomic
from conceptzap.format import cache as kept
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.runtime.attach import installed_on
from conceptzap.runtime.texts import of_text

SYNONYM = 0.85  # cosine of centred text vectors; high, for a neighbour taken for a synonym is lost
NOUNS = 2000  # of the vocabulary, in its own order
CHUNK = 64
KIND = "words"  # of the cache
VERSION = 2  # of what a vector is


def neighbours(
    base: Base, concept: str, more: Sequence[str] = (), report: Report | None = None
) -> list[tuple[str, float]]:
    """The base's words and `more` by text cosine to the concept, nearest first."""
    known, vectors = _vocabulary(base, report)
    extra = [word for word in dict.fromkeys([*more, concept]) if word not in known]
    mean = vectors.mean(0)
    everything = torch.cat([vectors, _read(base, extra)])
    cosines = F.normalize(everything - mean, dim=-1)
    words = [*known, *extra]
    values = (cosines @ cosines[words.index(concept)]).tolist()
    found = {
        word: value
        for word, value in zip(words, values, strict=True)
        if word.lower() != concept.lower()
    }
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


_WORDS: WeakKeyDictionary[Base, tuple[str, ...]] = WeakKeyDictionary()


def words(base: Base) -> tuple[str, ...]:
    """The words that any concept is compared with; looked up once for a base."""
    if base not in _WORDS:
        _WORDS[base] = _words(base)
    return _WORDS[base]


def _words(base: Base) -> tuple[str, ...]:
    vocabulary = base.vocabulary()
    if not bpe.is_small(base.tokenizers[0]):
        vocabulary = tuple(word for word in vocabulary if word in _nouns())[:NOUNS]
    presets = ("style", "object", "person", "unsafe")
    listed = (word for name in presets for word in config.kept_words(config.preset(name)))
    return tuple(dict.fromkeys([*vocabulary, *(w for w in listed if not base.unknown_words(w))]))


@cache
def _nouns() -> frozenset[str]:
    with gzip.open(Path(__file__).parent / "nouns.txt.gz", "rt", encoding="ascii") as lines:
        return frozenset(lines.read().split())


@torch.no_grad()
def _read(base: Base, words: Sequence[str], report: Report | None = None) -> Tensor:
    """The unit state at each word's end of text, fp32 [n, width] on the CPU."""
    chunks = [words[i : i + CHUNK] for i in range(0, len(words), CHUNK)]
    rows = [torch.zeros(0, sum(encoder.config.hidden_size for encoder in base.text_encoders))]
    for chunk in (report or Report()).count(chunks, len(chunks), "comparing words"):
        halves = []
        for encoder, ids, tokenizer in zip(
            base.text_encoders, base.token_ids(chunk), base.tokenizers, strict=True
        ):
            ends = (ids == tokenizer.eos_token_id).int().argmax(1)  # [chunk]
            # a causal encoder: what stands behind the end of text changes nothing in front of it
            short = ids[:, : int(ends.max()) + 1].to(base.device)  # [chunk, 3 or more]
            output = encoder(short, output_hidden_states=True)
            states = output.hidden_states[-2] if base.family == "sdxl" else output.last_hidden_state
            halves.append(F.normalize(states[torch.arange(len(ends)), ends].float().cpu(), dim=-1))
        rows.append(torch.cat(halves, -1))  # [chunk, width]
    return F.normalize(torch.cat(rows), dim=-1)


def _vocabulary(base: Base, report: Report | None) -> tuple[tuple[str, ...], Tensor]:
    """The base's words and their vectors [n, width], from the cache or into it."""
    known = words(base)
    text = base.fingerprint(())["text"]
    under = sorted(edit.name for edit in installed_on(base) if of_text(edit))
    name = hashlib.sha256(canonical_json([VERSION, text, list(known), *under]).encode()).hexdigest()
    path = kept.folder(KIND) / f"{name}.safetensors"
    vectors = _stored(path, len(known))
    if vectors is None:
        vectors = _read(base, known, report)
        _store(path, vectors)
        # as it will be read back: the second concept must see what the first one saw
        vectors = vectors.half().float()
    return known, vectors


def _stored(path: Path, count: int) -> Tensor | None:
    """The vectors in a file of the cache; None where there is none, or no sound one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        vectors = load(path.read_bytes())["vectors"].float()
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == count else None


def _store(path: Path, vectors: Tensor) -> None:
    from safetensors.torch import save

    # a cache that cannot be written costs time, nothing else
    with suppress(ConceptZapError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_atomic(path, save({"vectors": vectors.half().contiguous()}), True)
