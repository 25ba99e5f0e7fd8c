"""What a method learns one concept from: how it is asked for, its synonyms, and what must stay.

All of it comes from the task, the shipped word lists and the base's own vocabulary and text encoder;
nothing that scores are computed on takes part.

Contract: `settled` gives every concept a kind and an anchor, `lessons` yields one `Lesson` a concept,
`read` encodes its prompts once, and `gate` and `moves` take what was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from conceptzap.base import Base, bpe
from conceptzap.edit import Gate
from conceptzap.registry import config
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import closed_form, detector, neighbours, wordings
from conceptzap.training.closed_form import Moves
from conceptzap.training.states import States
from conceptzap.training.wordings import Pair

NEAREST = 80  # words of the vocabulary that join the keep set
BESIDE = 160  # more of them that a gate must stay shut for
WORDINGS = 2  # of each of these


@dataclass(frozen=True)
class Lesson:
    """One concept of a task. `pairs` ask for it and its synonyms, `keep` are prompts that must stay.

    `keep` takes its words in turn, so that any number of them from the front asks for all alike. `beside`
    are prompts of words that are farther from it, of which a gate must know, too.
    """

    concept: str
    anchor: str
    kind: str
    synonyms: tuple[str, ...]
    pairs: tuple[Pair, ...]
    keep: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def kept(self, n: int) -> list[str]:
        """n prompts of the keep set, spread evenly over its words."""
        return list(self.keep[:n])

    @property
    def names(self) -> tuple[str, ...]:
        """What the concept is called in the pairs."""
        return (self.concept, *self.synonyms)

    @property
    def swapped(self) -> tuple[Pair, ...]:
        """The pairs the other way round: what asks for the anchor where the concept was asked for."""
        return tuple(Pair(concept=pair.anchor, anchor=pair.concept) for pair in self.pairs)

    @property
    def prompts(self) -> list[str]:
        return [pair.concept for pair in self.pairs]

    @property
    def anchors(self) -> list[str]:
        return [pair.anchor for pair in self.pairs]


def lessons(base: Base, task: Task, report: Report | None = None) -> Iterator[Lesson]:
    """One lesson for each concept of the task; the other concepts are in nobody's keep set."""
    for concept, anchor, kind in task.triples:
        kind = kind or wordings.guess_kind(concept, anchor)
        yield _lesson(base, task, concept, anchor or "", kind, report)


def read(
    base: Base, lesson: Lesson, keep_prompts: int, report: Report | None = None, gated: bool = True
) -> States:
    """The text states of everything that a lesson's closed form is fitted on and, if `gated`, its gate."""
    asked = ["", *lesson.prompts, *lesson.anchors, *lesson.kept(keep_prompts)]
    return States.of(base, [*asked, *(lesson.beside if gated else ())], report)


def moves(base: Base, lesson: Lesson, states: States, keep_prompts: int) -> list[Moves]:
    """What the closed form of a lesson moves, and what it keeps (`closed_form.moves`)."""
    stay = list(dict.fromkeys([*lesson.anchors, *lesson.kept(keep_prompts)]))
    return closed_form.moves(base, states, lesson.pairs, lesson.names, lesson.anchor, stay)


def usual_keep(kinds: Iterable[str]) -> tuple[str, ...]:
    """The word lists of the kinds, each word once: what stays where nobody said what."""
    lists = (config.kept_words(config.preset(kind)) for kind in dict.fromkeys(kinds))
    return tuple(dict.fromkeys(word for words in lists for word in words))


def settled(base: Base, task: Task, report: Report) -> Task:
    """The task with a kind and an anchor for each concept; what had to be chosen is said."""
    kinds = tuple(kind or wordings.guess_kind(name, anchor) for name, anchor, kind in task.triples)
    anchors = []
    for concept, anchor, kind in zip(task.concepts, task.anchors, kinds, strict=True):
        if anchor is None or base.unknown_words(anchor):
            anchor = nearest(base, concept, kind, task.concepts)
            report.note(f"{concept} becomes {anchor or 'nothing'}, the nearest that {base.id} knows")
        anchors.append(anchor)
    return replace(task, anchors=tuple(anchors), kinds=kinds)


def nearest(base: Base, concept: str, kind: str, concepts: Iterable[str] = ()) -> str:
    """The concept of its kind that is nearest by text and no synonym; "" where the base knows none.

    What is unsafe becomes a thing.
    """
    return next(iter(alike(base, concept, kind, concepts)), "")


def alike(base: Base, concept: str, kind: str, concepts: Iterable[str] = ()) -> list[str]:
    """The concepts of its kind that are no synonyms, nearest by text first; of things, if it is unsafe."""
    others = _names_without(base, kind, (concept, *concepts))
    near = neighbours.neighbours(base, concept, others)
    return [name for name, cosine in near if name in others and cosine <= neighbours.SYNONYM]


def in_styles(base: Base, lesson: Lesson) -> list[str]:
    """Things that the presets list and the base knows, in every such style; none is the concept."""
    things, styles = (_names_without(base, kind, lesson.names) for kind in ("object", "style"))
    turns = ((style, prompt) for style in styles for prompt in wordings.keep(things, "object", [style]))
    asked = dict.fromkeys(prompt for style, prompt in turns if style in prompt)
    return [prompt for prompt in asked if not _speaks_of(prompt, lesson.names)]


def _names_without(base: Base, kind: str, concepts: Iterable[str]) -> list[str]:
    """The `known_names` that share no word with these concepts."""
    gone = {word.lower() for name in concepts for word in (name, *name.split())}
    return [name for name in known_names(base, kind) if not gone & {name.lower(), *name.lower().split()}]


def known_names(base: Base, kind: str) -> list[str]:
    """The concepts of a kind (of objects, for `unsafe`) that the presets list and the base knows for sure.

    Not what may be the mere end of a longer word, as "lock" in a small vocabulary that has "clock".
    """
    known = _known(base, config.preset("object" if kind == "unsafe" else kind).get("names", ()))
    if base.is_demo or not bpe.is_small(base.tokenizers[0]):
        return known
    whole = {*base.vocabulary()}
    return [name for name in known if whole.issuperset(name.lower().split())]


def gate(
    base: Base,
    told: Sequence[Lesson],
    seed: int,
    keep_prompts: int = 400,
    directions: int = 2,
    states: States | None = None,
    report: Report | None = None,
) -> Gate:
    """Opens for the concepts of the lessons; shut for the empty prompt, the anchors, what must stay.

    A synonym that it cannot tell from what stays is none of its own, if it then opens for less of that.
    `states` are those of `read`, where they are at hand.
    """
    prompts, shut = sides(told, keep_prompts)
    states = states or States.of(base, [*prompts, *shut], report)
    found = detector.fit_gate(states, prompts, shut, seed, directions, report)
    vague = _vague(found, told, states, shut) if detector.opens_wrongly(found) else []
    if vague:
        told = [replace(lesson, synonyms=_without(lesson.synonyms, vague)) for lesson in told]
        sure = [one for one in prompts if any(_speaks_of(one, lesson.names) for lesson in told)]
        again = detector.fit_gate(states, sure, shut, seed, directions, report)
        found = min(found, again, key=detector.opens_wrongly)
        if found is again and report:
            report.note(f"the gate is not told of {', '.join(vague)}: it would open for what stays")
    return found


def _without(words: Sequence[str], some: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for word in words if word not in some)


def _vague(gate: Gate, told: Sequence[Lesson], states: States, shut: Sequence[str]) -> list[str]:
    """The synonyms of which some prompt scores no higher than something that stays."""
    highest = detector.judged(gate, states, shut, own=False).max()
    found = []
    for lesson in told:
        for word in lesson.synonyms:
            others = _without(lesson.names, [word])
            own = [p for p in lesson.prompts if _speaks_of(p, [word]) and not _speaks_of(p, others)]
            if own and detector.judged(gate, states, own, own=True).min() <= highest:
                found.append(word)
    return found


def near(
    base: Base,
    told: Sequence[Lesson],
    seed: int,
    keep_prompts: int = 400,
    directions: int = 2,
    power: float = 1.0,
    report: Report | None = None,
) -> Gate:
    """The same as a soft gate: the nearer a prompt comes to the concept, the wider it is open."""
    prompts, shut = sides(told, keep_prompts)
    states = States.of(base, [*prompts, *shut], report)
    hard = detector.fit_gate(states, prompts, shut, seed, directions, report)
    return detector.soften(hard, states, prompts, shut, power)


def sides(told: Sequence[Lesson], keep_prompts: int = 400) -> tuple[list[str], list[str]]:
    """Prompts that a gate opens for, and those that it stays shut for."""
    prompts = [prompt for lesson in told for prompt in lesson.prompts]
    anchors = [prompt for lesson in told for prompt in lesson.anchors]
    kept = [prompt for lesson in told for prompt in lesson.kept(keep_prompts // len(told))]
    beside = [word for lesson in told for word in lesson.beside if word not in prompts]
    return prompts, list(dict.fromkeys(["", *anchors, *kept, *beside]))


def _lesson(
    base: Base, task: Task, concept: str, anchor: str, kind: str, report: Report | None
) -> Lesson:
    concept, anchor = wordings.bare(concept), wordings.bare(anchor)
    near = neighbours.neighbours(base, concept, task.keep, report)
    carriers = wordings.carriers()
    like = [word for word, cosine in near if cosine > neighbours.SYNONYM and word != anchor]
    synonyms = tuple(word for word in like if word.lower() not in carriers)
    words = [word for word, _ in near if word not in synonyms]
    named = _known(base, [*task.keep, anchor])
    kept = dict.fromkeys(word for word in [*named, *words[:NEAREST]] if word)
    gone = {word.lower() for name in (*task.concepts, *synonyms) for word in (name, *name.split())}
    kept = [word for word in kept if word.lower() not in gone]
    pairs = [p for name in (concept, *synonyms) for p in _pairs(base, name, anchor, kind, gone)]
    names = (concept, *synonyms)
    stay = ["", *_keep(base, kept, gone, ("style", "object"))]
    farther = [word for word in words[NEAREST : NEAREST + BESIDE] if word.lower() not in gone]
    told = _keep(base, farther, gone, ("object",), WORDINGS)
    stay, told = ([prompt for prompt in some if not _speaks_of(prompt, names)] for some in (stay, told))
    return Lesson(concept, anchor, kind, synonyms, tuple(pairs), tuple(stay), tuple(told))


def _speaks_of(prompt: str, names: Iterable[str]) -> bool:
    """Whether a prompt has one of the names in it, as "a sketch of a dog" has "sketch"."""
    return any(f" {name.lower()} " in f" {prompt.lower().replace(',', ' ')} " for name in names)


def _known(base: Base, words: Iterable[str]) -> list[str]:
    return [word for word in words if not base.unknown_words(word)]


def _things(base: Base, kind: str, gone: set[str]) -> list[str]:
    return [
        thing
        for thing in _known(base, wordings.wording(kind)["things"])
        if thing.lower() not in gone
    ]


def _pairs(base: Base, name: str, anchor: str, kind: str, gone: set[str]) -> list[Pair]:
    strange = set(base.unknown_words(f"{name} {anchor}"))
    things = _things(base, kind, gone)
    asked = wordings.pairs(name, anchor, kind, things)
    return [p for p in asked if set(base.unknown_words(f"{p.concept} {p.anchor}")) <= strange]


def _keep(
    base: Base, words: Iterable[str], gone: set[str], kinds: Sequence[str], most: int | None = None
) -> list[str]:
    """Prompts for words that stay, as if of these kinds: one for each word, then another for each.

    At most so many a word. Each word begins with a wording of its own, so that none is everybody's first.
    """
    things = {kind: _known(base, wordings.wording(kind)["things"]) for kind in kinds}
    turns = []
    for word in words:
        every = [prompt for kind in kinds for prompt in wordings.keep([word], kind, things[kind], gone)]
        known = [prompt for prompt in every if not base.unknown_words(prompt)]
        start = wordings.spread(word) % max(1, len(known))
        turns.append([*known[start:], *known[:start]][:most])
    asked = chain.from_iterable(zip_longest(*turns))
    return list(dict.fromkeys(prompt for prompt in asked if prompt is not None))
