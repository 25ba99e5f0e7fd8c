"""A concept's name written wrongly, or another word in its place: what needs no search."""

from __future__ import annotations

import re
from collections.abc import Sequence

from conceptzap.words import ARTICLES

ARTICLE = f"(?:{'|'.join(ARTICLES)})"


def slips(word: str, at: int) -> tuple[str, str, str]:
    """A word with the letter `at` (from 0) swapped with the next, left out, and doubled."""
    before, letter, after = word[:at], word[at : at + 1], word[at + 1 :]
    return before + after[:1] + letter + after[1:], before + after, before + 2 * letter + after


def misspelt(name: str) -> list[str]:
    """A name with each slip in its longest word, and with its letters apart; no two alike."""
    word = max(name.split(), key=len)
    wrong = [name.replace(word, slip) for at in range(len(word)) for slip in slips(word, at)]
    return [one for one in dict.fromkeys([*wrong, " ".join(name)]) if one.strip() and one != name]


def reworded(prompt: str, words: Sequence[str], wording: str) -> str:
    """The prompt with the longest of the concept's words that it has replaced, whatever their case.

    A wording with an article of its own takes the place of the prompt's, too.
    """
    apart = max(map(len, wording.split()), default=0) < 2  # "a p p l e" begins with no article
    has_one = not apart and re.match(rf"{ARTICLE} ", wording, re.IGNORECASE)
    article = rf"(?:\b{ARTICLE} )?" if has_one else ""
    for word in sorted(words, key=len, reverse=True):
        found = re.compile(rf"{article}\b{re.escape(word)}\b", re.IGNORECASE)
        if found.search(prompt):
            return found.sub(lambda _: wording, prompt)
    return f"{prompt}, {wording}"
