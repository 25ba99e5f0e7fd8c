"""English for templates and messages. No torch."""

from __future__ import annotations

ARTICLES = ("a", "an", "the")


def with_article(noun: str) -> str:
    """ "apple" -> "an apple"; what begins with an article keeps it."""
    if noun.partition(" ")[0].lower() in ARTICLES:
        return noun
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
