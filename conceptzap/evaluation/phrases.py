"""How figures are said: names, what they mean, percentages, intervals. No torch."""

from __future__ import annotations

from conceptzap.result import Result, Score

# in the order in which they are read; a metric that is not here stands in the report alone
HEADLINES = (
    "E", "seen before", "seen after", "P", "right before", "right after", "H", "Leak@1", "Leak@20",
    "ESR-1", "PSR-1", "ESR-3", "PSR-3", "ESR-5", "PSR-5", "UA", "IRA", "CRA", "validity",
    "diversity", "drift", "KID", "identical", "gate_false_open", "gate_false_shut",
)  # fmt: skip
# what is told first; the benchmarks' own metrics are there for whoever asks
FIRST = (
    "E", "seen before", "seen after", "P", "right before", "right after", "H", "Leak@1", "Leak@20",
    "validity", "drift", "identical",
)  # fmt: skip
PLAIN = ("drift", "KID")  # no shares, so no percentages
NAMES = {
    "E": "erased (E)",
    "P": "kept (P)",
    "H": "both (H)",
    "seen before": "concept shown, base",
    "seen after": "concept shown, erased",
    "right before": "rest recognised, base",
    "right after": "rest recognised, erased",
    "validity": "real pictures",
    "identical": "identical to the base",
    "gate_false_open": "acts off topic",
    "gate_false_shut": "misses the topic",
}
# what `erase` closes with, all of them shares
CLOSING = {
    "leak": "still shown (leak)",
    "object_kept": "object still right (object_kept)",
    "style_kept": "style still right (style_kept)",
    "preservation": "the rest kept (preservation)",
}
ABOUT = {
    "E": "of what the base drew of the concept, the share that is gone",
    "P": "of what the classifiers recognise in other pictures, the share that stays",
    "H": "harmonic mean of E and P",
    "seen before": "some classifier sees the concept in the original model's pictures",
    "seen after": "some classifier sees the concept in the erased model's pictures",
    "right before": "all classifiers see what was to stay, original model",
    "right after": "all classifiers see what was to stay, erased model",
    "Leak@1": "chance that one try shows the concept",
    "Leak@20": "chance that one of twenty tries shows it",
    "UA": "erased concepts not recognised (UnlearnCanvas)",
    "IRA": "others of their kind recognised (UnlearnCanvas)",
    "CRA": "other kinds recognised (UnlearnCanvas)",
    "validity": "taken for pictures at all, of the original model's",
    "diversity": "how unlike one another, of the original model's",
    "drift": "0: the original's pictures, 1: as far as another seed's",
    "KID": "distance of other pictures to the original's, x 1000",
    "identical": "of other pictures, bit for bit the original's",
    "gate_false_open": "the erasure acts where it should not",
    "gate_false_shut": "the erasure sleeps where it should act",
}
RANKED = {
    "ESR": "concept not among a classifier's first {} labels",
    "PSR": "what was to stay among every classifier's first {}",
    "NER": "pictures with an exposed part above {}",
}
SLICES = {
    "erase/seen": "Erased: its name, in wordings used for erasing",
    "erase/held-out": "Erased: its name, in new wordings",
    "erase/synonym": "Erased: its synonyms",
    "erase/bare": "Erased: the style alone",
    "erase/crossed": "Erased: the object in other styles",
    "erase/composed": "Erased: beside something to keep",
    "erase/sealed": "Erased: hidden prompts that no file can know",
    "keep/neighbour": "Kept: nearest neighbours",
    "keep/unrelated": "Kept: unrelated",
    "keep/style": "Kept: other styles",
    "keep/composed": "Kept: two objects together",
}
WHOLE_SCALE = 0.9  # an interval as wide as this says nothing
TOO_FEW = "too few of these"


def about(metric: str) -> str:
    """A metric in a few words."""
    family, _, number = metric.partition("-")
    return ABOUT.get(metric) or RANKED.get(family, "").format(number)


def figure(score: Score, value: float | None = None) -> str:
    """A score's value (or one of its limits) as it is printed: shares in percent."""
    shown = score.value if value is None else value
    return f"{shown:.3g}" if score.metric in PLAIN else f"{100 * shown:.1f} %"


def interval(score: Score) -> str:
    """`94.0 to 100 %`; where it is the whole scale, that there are too few to say."""
    if says_nothing(score):
        return TOO_FEW
    if score.metric in PLAIN:
        return f"{score.low:.3g} to {score.high:.3g}"
    return f"{100 * score.low:.1f} to {100 * score.high:.1f} %"


def says_nothing(score: Score) -> bool:
    """Whether a share may be anything: too few pictures, or the base itself shows too few of these."""
    return score.metric not in PLAIN and score.high - score.low > WHOLE_SCALE


def key(metric: str, slice: str = "") -> str:
    """A score's name in JSON: `E`, `E [erase/seen]`."""
    return f"{metric} [{slice}]" if slice else metric


def name(score: Score) -> str:
    """A score's name for people: `erased (E)`, `kept (P): nearest neighbours`."""
    said = NAMES.get(score.metric, score.metric)
    title = SLICES.get(score.slice, score.slice).partition(": ")[2]
    return f"{said} [{title or score.slice}]" if score.slice else said


def oracle(result: Result, score: Score) -> str:
    """The same score of a model trained without the concept, "-" where it is not known."""
    known = result.oracle.get(key(score.metric, score.slice))
    return figure(score, known["value"]) if known else "-"


def headlines(result: Result, metrics: tuple[str, ...] = HEADLINES) -> list[Score]:
    """The scores over everything, and diversity's two, in reading order; NER at the end."""
    overall = [s for s in result.scores if not s.slice or s.metric == "diversity"]
    others = [s for s in result.scores if s.metric.startswith("NER-")]
    chosen = [score for score in overall if score.metric in metrics]
    return sorted(chosen, key=lambda score: metrics.index(score.metric)) + others
