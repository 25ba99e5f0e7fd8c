"""English for templates and messages. No torch."""

from __future__ import annotations

import re

ARTICLES = ("a", "an", "the")
CONSONANT = re.compile("uni(?![nm])|unet|us[eu]|euro|one-")  # is spoken first: "a unicorn", "a UNet"


def with_article(noun: str) -> str:
    """ "apple" -> "an apple"; what begins with an article keeps it."""
    spoken = noun.lower()
    if spoken.partition(" ")[0] in ARTICLES:
        return noun
    vowel = spoken[:1] in tuple("aeiou") and not CONSONANT.match(spoken)
    return f"{'an' if vowel else 'a'} {noun}"
