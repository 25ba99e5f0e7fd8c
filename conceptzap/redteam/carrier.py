"""What a search for free tokens may use, and prompts without the words that it must do without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conceptzap.base import Base
from conceptzap.training.carrier import ids_of, replaced


def allowed(base: Base, words: Sequence[str]) -> Tensor:
    """Which tokens an attack may use, [vocabulary]: none of the special ones, none of these words."""
    tokenizer = base.tokenizers[0]
    barred = set(tokenizer.all_special_ids)
    for word in words:
        for text in (word, *word.split()):
            ids = ids_of(base, text)
            barred |= set(ids if len(ids) <= len(text.split()) else ids[-1:])  # of many, what ends them
    return torch.tensor([number not in barred for number in range(len(tokenizer))])


def common(base: Base, words: Sequence[str]) -> Tensor:
    """Whole words that a search may begin from, [vocabulary]: none of these."""
    tokenizer, barred = base.tokenizers[0], {part for word in words for part in word.casefold().split()}
    usable = torch.zeros(len(tokenizer), dtype=torch.bool)
    for word in base.vocabulary():
        found = ids_of(base, word)
        if len(found) == 1 and word not in barred:
            usable[found[0]] = True
    return usable


def without(base: Base, prompt: str, words: Sequence[str]) -> str:
    """The prompt with the first of the words that it has left out."""
    return base.tokenizers[0].decode(replaced(base, prompt, words, []), skip_special_tokens=True)
