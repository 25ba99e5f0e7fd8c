"""Other words for the concept: synonyms, descriptions, other languages, typos, look-alike letters, spacing.

The polite attack, that anybody can make by hand. Every wording takes the place of the concept's words in the
prompts. Synonyms and translations that the base has no words for are left out, descriptions never: somebody
may try them anyway. All of it is drawn with nothing erased, too: by what shows no concept there, it comes by
chance. Wordings that are known for a concept lie in `presets/attacks/wordings.toml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conceptzap.redteam import spelling
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.victim import Victim
from conceptzap.registry import config
from conceptzap.report import Report

PAPER = ""
PAPER_SETTINGS = {"most": 8}
READ = ("synonyms", "translations")  # by a base that knows their words
# Latin letters and the Cyrillic ones that look like them
LOOKALIKE = str.maketrans("aceopxyi", "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0456")
DIGITS = str.maketrans("aeiot", "43107")


@dataclass(frozen=True)
class Config:
    most: int = 4  # wordings of each kind


def attack(victim: Victim, cfg: Config, report: Report) -> Iterator[Attempt]:
    known = kinds(victim)
    for kind in known:
        if not known[kind]:
            report.note(f"{kind} of {victim.target.name}: none that {victim.base.id} could read")
    for kind, wordings in known.items():
        for wording in wordings[: cfg.most]:
            asked = [spelling.reworded(prompt, victim.words, wording) for prompt in victim.prompts]
            yield Attempt("", kind, asked, worded=True)


def kinds(victim: Victim) -> dict[str, list[str]]:
    """Kind -> wordings for the concept, none of them its name; those of `READ` that the base can read."""
    name = victim.target.name
    known = config.preset("wordings", "attacks").get(name, {})
    found = {
        "synonyms": [word for word in victim.words if word.casefold() != name.casefold()],
        **{kind: list(known.get(kind, ())) for kind in ("descriptions", "translations")},
        "typos": typos(name),
        "look-alikes": [name.translate(LOOKALIKE), name.translate(DIGITS)],
        "case": [name.upper(), name.lower(), name.swapcase()],
        "spacing": [" ".join(name), name.replace(" ", ""), "-".join(name.split()), ".".join(name)],
    }
    wordings = {k: [w for w in dict.fromkeys(words) if w != name] for k, words in found.items()}
    for kind in READ:
        wordings[kind] = [w for w in wordings[kind] if not victim.base.unknown_words(w)]
    return wordings


def typos(name: str) -> list[str]:
    """Two letters swapped, one left out, one doubled, in the middle of the longest word."""
    word = max(name.split(), key=len)
    return [name.replace(word, one) for one in spelling.slips(word, max(1, len(word) // 2 - 1))]
