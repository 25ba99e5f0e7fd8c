"""Tokenizers in CLIP's format from their merges alone: byte-level BPE, word ends marked `</w>`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
LENGTH = 77
# a vocabulary this small was made for its captions: a word it spells out is one it never saw
SMALL = 5000
CLIP_MERGES = Path(__file__).parent / "configs" / "clip_merges.txt.gz"

Pair = tuple[str, str]


# bytes that print in Latin-1 and stand for themselves
PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def byte_letters() -> list[str]:
    """The printable stand-ins for the 256 bytes, in the order CLIP numbers them.

    Printable Latin-1 stands for itself, every other byte for a code point from 256 on (Radford et
    al. 2019, section 2.2).
    """
    return [chr(byte) for byte in PRINTED] + [chr(256 + n) for n in range(256 - len(PRINTED))]


def spelled(pieces: Iterable[str]) -> str:
    """What the tokens of a word spell; what is no UTF-8 text, as the replacement character."""
    rest = (byte for byte in range(256) if byte not in PRINTED)
    values = dict(zip(byte_letters(), (*PRINTED, *rest), strict=True))
    word = "".join(pieces).removesuffix(WORD_END)
    return bytes(values.get(letter, ord("?")) for letter in word).decode("utf-8", "replace")


def tokenizer(merges: Iterable[Pair], pad: str = END) -> CLIPTokenizer:
    """The tokenizer of these merges: 256 bytes, the same at a word's end, merges, start, end."""
    merges = list(merges)
    return CLIPTokenizer(
        vocab=_numbered(merges),
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad,
        model_max_length=LENGTH,
    )


def _numbered(merges: Iterable[Pair]) -> dict[str, int]:
    """The tokens of these merges and their numbers."""
    letters = byte_letters()
    ends = [letter + WORD_END for letter in letters]
    tokens = [*letters, *ends, *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def is_clips(tokenizer: CLIPTokenizer) -> bool:
    """Whether it has CLIP's own tokens under CLIP's own numbers."""
    return tokenizer.get_vocab() == _numbered(_clip_merges())


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """CLIP's own tokenizer (49,408 tokens). Stable Diffusion 2 and SDXL's second pad with "!"."""
    return tokenizer(_clip_merges(), pad)


@cache
def _clip_merges() -> tuple[Pair, ...]:
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode("utf-8").splitlines()
    return tuple(tuple(line.split()) for line in lines)


def is_small(tokenizer: CLIPTokenizer) -> bool:
    return len(tokenizer) < SMALL


def whole_words(tokenizer: CLIPTokenizer) -> tuple[str, ...]:
    """Tokens that are words: three letters or more, a to z, in the tokenizer's order.

    In a small vocabulary the ends of longer words ("rch" of "church") are left out, and with them
    the few ends that are words as well.
    """
    skipped = _word_ends(tokenizer) if is_small(tokenizer) else frozenset()
    tokens = tokenizer.get_vocab()
    whole = (token for token in sorted(tokens, key=tokens.__getitem__) if token not in skipped)
    words = (token.removesuffix(WORD_END) for token in whole if token.endswith(WORD_END))
    return tuple(word for word in words if len(word) >= 3 and word.isascii() and word.isalpha())


def _word_ends(tokenizer: CLIPTokenizer) -> frozenset[str]:
    """Tokens that a merge takes as the end of a longer word."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return frozenset(right for _, right in pairs)
