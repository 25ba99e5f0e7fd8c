"""Prompts with free tokens in them, encoded so that gradients reach what stands in the free places."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conceptzap.base import Base, Cond
from conceptzap.errors import UsageError

FREE = -1


@dataclass(frozen=True)
class Carrier:
    """n prompts with k free tokens each, for every text encoder of a base.

    `ids`: token ids [n, 77] an encoder, padded; `slots` [n, k]: where the free tokens stand.
    """

    base: Base
    ids: tuple[Tensor, ...]
    slots: Tensor

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def free(self) -> int:
        return self.slots.shape[1]

    @staticmethod
    def before(base: Base, prompts: Sequence[str], free: int) -> Carrier:
        """k free tokens in front of each prompt."""
        return _laid_out(base, [[FREE] * free + ids_of(base, prompt) for prompt in prompts], free)

    @staticmethod
    def instead(base: Base, prompts: Sequence[str], words: Sequence[str], free: int) -> Carrier:
        """k free tokens in place of the first of the words that a prompt has; in front where it has none."""
        return _laid_out(base, [replaced(base, prompt, words, [FREE] * free) for prompt in prompts], free)

    @staticmethod
    def alone(base: Base, n: int, free: int) -> Carrier:
        """Nothing but k free tokens."""
        return _laid_out(base, [[FREE] * free] * n, free)

    def rows(self, chosen: Sequence[int] | slice | Tensor) -> Carrier:
        return Carrier(self.base, tuple(each[chosen] for each in self.ids), self.slots[chosen])

    def by(self, base: Base) -> Carrier:
        """The same prompts, read by the text encoders of another base that has these tokens, too."""
        return Carrier(base, self.ids, self.slots)

    def tokens(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """All token ids [n, 77] of each encoder, with these [n, k] in the free places."""
        return tuple(each.scatter(1, self.slots, chosen.cpu()) for each in self.ids)

    def texts(self, chosen: Tensor) -> list[str]:
        """The prompts with these tokens [n, k] in the free places, as text."""
        tokenizer = self.base.tokenizers[0]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in self.tokens(chosen)[0].tolist()]

    def written(self, chosen: Tensor) -> Cond:
        """Text states with these tokens [n, k] in the free places."""
        with torch.no_grad():
            return self.base.encode_ids(self.tokens(chosen))

    def states(self, embeddings: Sequence[Tensor]) -> Cond:
        """Text states with embeddings [n, k, d] (one tensor an encoder) in the free places."""
        with ExitStack() as stack:
            for encoder, values in zip(self.base.text_encoders, embeddings, strict=True):
                table = encoder.get_input_embeddings()
                handle = table.register_forward_hook(_Written(self.slots, values))
                stack.callback(handle.remove)
            return self.base.encode_ids(self.ids)


@dataclass(frozen=True)
class _Written:
    """A hook on an embedding table that writes values [n, k, d] into the places `slots` [n, k]."""

    slots: Tensor
    values: Tensor

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        where = self.slots.to(output.device)[..., None].expand(-1, -1, output.shape[-1])
        return output.scatter(1, where, self.values.to(output))


def tables(base: Base) -> tuple[Tensor, ...]:
    """The embedding table [vocabulary, d] of each text encoder, in fp32."""
    return tuple(one.get_input_embeddings().weight.detach().float() for one in base.text_encoders)


def split(base: Base, joined: Tensor) -> list[Tensor]:
    """Embeddings of all encoders side by side, [n, k, d1 + d2], as one tensor an encoder."""
    widths = [one.get_input_embeddings().weight.shape[1] for one in base.text_encoders]
    return list(joined.split(widths, -1))


def ids_of(base: Base, text: str) -> list[int]:
    return list(base.tokenizers[0](text, add_special_tokens=False, verbose=False).input_ids)


def position(base: Base, text: str, word: str) -> int:
    """Where a word's last token stands in a text's states, the start being 0; the text's last without it."""
    ids, part = ids_of(base, text), ids_of(base, word)
    start = _place(ids, part)
    return len(ids) if start is None else start + len(part)


def replaced(base: Base, prompt: str, words: Sequence[str], by: list[int]) -> list[int]:
    """The tokens of a prompt with those of the longest of the words that it has replaced."""
    ids = ids_of(base, prompt)
    for part in sorted((ids_of(base, word) for word in words), key=len, reverse=True):
        start = _place(ids, part)
        if start is not None:
            return ids[:start] + by + ids[start + len(part) :]
    return by + ids


def _place(ids: list[int], part: list[int]) -> int | None:
    """Where some tokens begin among others, the first time; None where they do not, or are none."""
    starts = range(len(ids) - len(part) + 1 if part else 0)
    return next((start for start in starts if ids[start : start + len(part)] == part), None)


def _laid_out(base: Base, texts: Sequence[list[int]], free: int) -> Carrier:
    """Start, tokens, end and padding, cut at the encoder's length; free places hold id 0."""
    first = base.tokenizers[0]
    length = first.model_max_length
    cut = [text[: length - 2] for text in texts]
    alone = any(len(text) > free and {*left} <= {FREE} for text, left in zip(texts, cut, strict=True))
    texts = [[first.bos_token_id, *text, first.eos_token_id] for text in cut]
    found = [[i for i, one in enumerate(text) if one == FREE] for text in texts]
    if alone or any(len(one) != free for one in found):  # cut off, or all that is left
        message = f"{free} tokens find no room in a text of {length - 2}"
        raise UsageError(message, "use fewer, or a shorter prompt")
    slots = torch.tensor(found)
    inside = [[0 if one == FREE else one for one in text] for text in texts]  # never read
    ids = tuple(
        torch.tensor([text + [tokenizer.pad_token_id] * (length - len(text)) for text in inside])
        for tokenizer in base.tokenizers
    )
    return Carrier(base, ids, slots.view(len(texts), free))
