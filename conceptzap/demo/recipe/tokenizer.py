"""A small byte-level BPE tokenizer in CLIP's format, learned from the demo's own captions.

All 256 bytes are tokens, alone and at a word's end, so that no text ever falls back to the
end-of-text token.
"""

from __future__ import annotations

from collections import Counter

from transformers import CLIPTokenizer

from conceptzap.demo.world import OBJECTS, STYLES, fill, templates

SIZE = 1000
LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"

Pair = tuple[str, str]


def build_tokenizer() -> CLIPTokenizer:
    """The demo's tokenizer; the same one every time."""
    vocabulary, merges = learn(word_counts(), SIZE)
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, bos_token=START, eos_token=END, unk_token=END,
        pad_token=END, model_max_length=LENGTH)


def word_counts() -> Counter[str]:
    """How often each lower-case word stands in the captions of the whole grammar."""
    counts: Counter[str] = Counter()
    for style in STYLES:
        lines = list(style.bare)
        for template in (*templates(style), *templates(style, held_out=True)):
            lines += [fill(template, word) for thing in OBJECTS for word in thing.words]
        for line in lines:
            counts.update(line.lower().replace(",", " ,").split())
    return counts


def learn(counts: Counter[str], size: int) -> tuple[dict[str, int], list[Pair]]:
    """Byte-pair merges (Sennrich et al. 2016) up to a vocabulary of `size` tokens.

    Ties are broken by the pair itself, so the result depends on nothing but the counts.
    """
    letters = _byte_letters()
    tokens = [START, END, *letters, *(letter + _WORD_END for letter in letters)]
    words = {word: [*word[:-1], word[-1] + _WORD_END] for word in sorted(counts)}
    merges: list[Pair] = []
    while len(tokens) < size:
        pairs: Counter[Pair] = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        tokens.append("".join(best))
        words = {word: _merge(parts, best) for word, parts in words.items()}
    return {token: number for number, token in enumerate(tokens)}, merges


def _merge(parts: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_letters() -> list[str]:
    """The printable stand-ins that byte-level BPE writes for the 256 bytes (as GPT-2 and CLIP)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    stand_ins = {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [stand_ins.get(byte, chr(byte)) for byte in range(256)]
