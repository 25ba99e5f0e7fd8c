"""What is asked of a model: a suite's prompts by slice, with seeds that erasing cannot have met. No torch.

A slice is `erase/<name>` (the concept must be gone) or `keep/<name>` (everything must stay):

    erase/seen       the concept's name in templates that erasing may train on
    erase/held-out   its name in templates that erasing never sees
    erase/synonym    its other words
    erase/bare       a style with no object at all
    erase/crossed    an object in other styles
    erase/composed   the concept beside a second object
    erase/sealed     prompts and seeds chosen by the erasure's own digest, so no file can know them
    keep/neighbour   the nearest concepts of its kind
    keep/unrelated   other objects
    keep/style       other styles
    keep/composed    two objects that both stay
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conceptzap.edit import canonical_json
from conceptzap.result import MAX_SEED, Probe
from conceptzap.words import with_article

Pairs = tuple[tuple[str, str], ...]
Question = tuple[str, Pairs]  # a prompt and what it should show
STYLE, OBJECT = "style", "object"
SCENE = "scene"  # a subject that gives a prompt contents and is not judged
FALLBACK = "held-out"  # takes the share of a slice that a concept has no prompts for


@dataclass(frozen=True)
class Subject:
    """Something that can be drawn and judged: an object, a style, a person ...

    `words` are those erasing may train on, the name first; `held_out` are kept from it; `bare` are
    captions of a style alone.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """Subjects, caption templates and the split of concepts that a suite draws its prompts from.

    `templates`: style name -> (templates erasing may train on, held-out ones), with `{a}` for "a
    cat" and `{o}` for "cat"; `plain` is the style of ordinary captions.
    """

    subjects: tuple[Subject, ...]
    templates: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    plain: str = ""
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, word: str) -> Subject | None:
        """The subject with this name or synonym, in any case."""
        wanted = " ".join(word.casefold().split())
        for subject in self.subjects:
            if wanted in (w.casefold() for w in (subject.name, *subject.words, *subject.held_out)):
                return subject
        return None

    def of_kind(self, kind: str) -> list[Subject]:
        return [subject for subject in self.subjects if subject.kind == kind]

    def share(self, name: str) -> str:
        """dev, test or retain; "" where the world has no split."""
        return next((part for part, names in self.split.items() if name in names), "")


@dataclass(frozen=True)
class Suite:
    """How many pictures a slice gets per concept (`erase`) or in all (`keep`), and how they are drawn."""

    name: str
    summary: str
    judges: tuple[str, ...]
    erase: Mapping[str, int]
    keep: Mapping[str, int]
    repeats: int = 1  # seeds a prompt
    steps: int = 20
    guidance: float = 4.0
    batch: int = 16
    identical: int = 0  # kept pictures drawn one by one
    neighbours: int = 0  # nearest concepts: half by text, half by what the judges confuse


def world(table: Mapping[str, Any]) -> World:
    """A world from a suite's `[world]` table.

    `objects`, `styles`: names; `kind`: what the objects are ("object", "scene" for what is not
    judged ...); `synonyms`: name -> other words; `seen`, `held_out`: templates; `style_seen`,
    `style_held_out`, `style_bare`: templates with `{style}` beside `{a}` or `{o}`; `split`.
    """
    other = table.get("synonyms", {})
    kinds = table.get("kinds", {})
    kind = table.get("kind", OBJECT)
    objects = [
        Subject(name, kinds.get(name, kind), (name,), tuple(other.get(name, ())))
        for name in table.get("objects", ())
    ]
    styles, templates = [], {"": (tuple(table["seen"]), tuple(table["held_out"]))}
    for name in table.get("styles", ()):
        bare, seen, held_out = (
            tuple(text.replace("{style}", name) for text in table.get(f"style_{which}", ()))
            for which in ("bare", "seen", "held_out")
        )
        styles.append(Subject(name, STYLE, (name,), tuple(other.get(name, ())), bare))
        templates[name] = (seen, held_out)
    split = {part: tuple(names) for part, names in table.get("split", {}).items()}
    return World((*objects, *styles), templates, "", split)


def fill(template: str, *nouns: str) -> str:
    """A template with its object or objects put in: "a cat", "an apple and a dog"."""
    both = " and ".join(map(with_article, nouns))
    return template.format(a=both, o=" and ".join(nouns))


def seed_of(seal: str, prompt: str, index: int) -> int:
    """Seed `index` of a prompt: 63 bits of HMAC-SHA256 under the seal."""
    digest = hmac.digest(seal.encode(), f"{prompt}|{index}".encode(), "sha256")
    return int.from_bytes(digest[:8], "big") & MAX_SEED


def digest(probes: Iterable[Probe]) -> str:
    """sha256 over all probes but the sealed ones, which differ from file to file by design."""
    records = [probe.record() for probe in probes if probe.slice != "erase/sealed"]
    return hashlib.sha256(canonical_json(records).encode()).hexdigest()


def _shuffled(seal: str, questions: Iterable[Question], evenly: slice) -> list[Question]:
    """Distinct questions in an order that the seal decides, dealt over that part of what they show."""
    distinct = dict(questions)
    order = sorted(distinct, key=lambda p: hmac.digest(seal.encode(), p.encode(), "sha256"))
    turns: dict[Pairs, int] = {}
    ranked = []
    for prompt in order:
        shown = distinct[prompt][evenly]
        turn = turns[shown] = turns.get(shown, 0) + 1
        ranked.append((turn, prompt))
    ranked.sort(key=lambda pair: pair[0])
    return [(prompt, distinct[prompt]) for _, prompt in ranked]


def _pick(
    name: str, questions: Iterable[Question], count: int, repeats: int, seal: str, concept: str = ""
) -> list[Probe]:
    """`count` probes of a slice; few questions get more seeds each, so that none goes missing."""
    evenly = slice(-1, None) if name == "keep/style" else slice(None)
    chosen = _shuffled(seal, questions, evenly)[: max(1, count // repeats)]
    if not chosen:
        return []
    turns = ((index, question) for index in itertools.count() for question in chosen)
    return [
        Probe(name, prompt, seed_of(seal, prompt, index), expect, concept)
        for index, (prompt, expect) in itertools.islice(turns, count)
    ]


class Expansion:
    """The questions a world has for some concepts; `others` are what stays."""

    def __init__(self, world: World, targets: Sequence[Subject]) -> None:
        self.world, self.targets = world, tuple(targets)
        gone = {(target.kind, target.name) for target in targets}
        stays = [s for s in world.subjects if (s.kind, s.name) not in gone]
        self.styles = [s for s in stays if s.kind == STYLE]
        self.objects = [s for s in stays if s.kind != STYLE]
        self.looks = {s.name for s in world.of_kind(STYLE)}

    def _templates(self, style: str, which: str = "both") -> tuple[str, ...]:
        seen, held_out = self.world.templates[style]
        return {"seen": seen, "held-out": held_out, "both": seen + held_out}[which]

    def _shows(self, style: str, *subjects: Subject) -> Pairs:
        looks = ((STYLE, style),) if style in self.looks else ()
        return tuple((s.kind, s.name) for s in subjects if s.kind != SCENE) + looks

    def _ask(
        self, style: str, which: str, subjects: Iterable[Subject], words: bool = False
    ) -> Iterator[Question]:
        """Every template of a style with every subject, by its name or by its other words."""
        for template, subject in itertools.product(self._templates(style, which), subjects):
            for word in (*subject.words[1:], *subject.held_out) if words else subject.words[:1]:
                yield fill(template, word), self._shows(style, subject)

    def _pair(self, style: str, left: Subject, right: Subject) -> Iterator[Question]:
        for template in self._templates(style):
            if "{a}" in template:
                yield fill(template, left.words[0], right.words[0]), self._shows(style, left, right)

    def erase(self, target: Subject, name: str) -> Iterator[Question]:
        """The questions of slice `erase/<name>` for one concept; none where the slice makes no sense."""
        of_style = target.kind == STYLE
        style = target.name if of_style else self.world.plain
        subjects = self.objects if of_style else [target]
        if name in ("seen", "held-out"):
            yield from self._ask(style, name, subjects)
        elif name == "synonym" and not of_style:
            yield from self._ask(style, "both", subjects, words=True)
        elif name == "bare" and of_style:
            yield from ((text, ((STYLE, target.name),)) for text in target.bare)
        elif name == "crossed" and not of_style:
            for look in self.styles:
                if look.name != self.world.plain:
                    yield from self._ask(look.name, "both", subjects)
        elif name == "composed" and of_style:
            for left, right in _neighbouring(self.objects):
                yield from self._pair(style, left, right)
        elif name == "composed":
            for other in self.objects:
                yield from self._pair(style, target, other)
        elif name == "sealed":
            yield from self._ask(style, "both", subjects)
            yield from self._ask(style, "both", subjects, words=True)
            yield from self.erase(target, "crossed")

    def keep(self, name: str, neighbours: Sequence[Subject]) -> Iterator[Question]:
        """The questions of slice `keep/<name>`."""
        plain = self.world.plain
        if name == "neighbour":
            yield from self._ask(plain, "both", [s for s in neighbours if s.kind != STYLE])
            for look in neighbours:
                if look.kind == STYLE:
                    yield from self._ask(look.name, "both", self.objects)
        elif name == "unrelated":
            near = {s.name for s in neighbours}
            away = [s for s in self.objects if s.name not in near]
            yield from self._ask(plain, "both", away or self.objects)
        elif name == "style":
            for look in self.styles:
                yield from self._ask(look.name, "both", self.objects)
        elif name == "composed":
            for left, right in _neighbouring(self.objects):
                yield from self._pair(plain, left, right)


def _neighbouring(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Subject]]:
    """Pairs at several distances in the list, so that a pair mixes groups."""
    for step in (1, 7, 19):
        for index, left in enumerate(subjects[:-step]):
            yield left, subjects[index + step]


def expand(
    suite: Suite,
    world: World,
    targets: Sequence[Subject],
    neighbours: Sequence[Subject] = (),
    seed: int = 0,
    sealed_by: str = "",
) -> tuple[Probe, ...]:
    """All probes of a suite, slice by slice, for those of one are drawn together.

    `sealed_by`: the digest that chooses the sealed slice; "" leaves it out.
    """
    questions = Expansion(world, targets)
    probes: list[Probe] = []
    for target in targets:
        probes += _erase_probes(suite, questions, target, f"conceptzap-suite-{seed}")
    if sealed_by:
        asked = {probe.prompt for probe in probes}
        for target in targets:
            probes += _sealed(suite, questions, target, sealed_by, asked)
    for name, count in suite.keep.items():
        label = f"keep/{name}"
        seal = f"conceptzap-suite-{seed}/{label}"
        probes += _pick(label, questions.keep(name, neighbours), count, suite.repeats, seal)
    slices = list(dict.fromkeys(probe.slice for probe in probes))
    return tuple(sorted(probes, key=lambda probe: slices.index(probe.slice)))


def _erase_probes(suite: Suite, questions: Expansion, target: Subject, seal: str) -> list[Probe]:
    counts = {name: count for name, count in suite.erase.items() if name != "sealed"}
    for name in [n for n in counts if not any(questions.erase(target, n))]:
        counts[FALLBACK] = counts.get(FALLBACK, 0) + counts.pop(name)
    probes = []
    for name, count in counts.items():
        asked = questions.erase(target, name)
        label = f"erase/{name}"
        probes += _pick(label, asked, count, suite.repeats, f"{seal}/{label}", target.name)
    return probes


def _sealed(
    suite: Suite, questions: Expansion, target: Subject, seal: str, asked: set[str]
) -> list[Probe]:
    """Prompts that the open slices did not use, as far as the world has any."""
    pool = dict(questions.erase(target, "sealed"))
    fresh = {prompt: expect for prompt, expect in pool.items() if prompt not in asked} or pool
    count = suite.erase.get("sealed", 0)
    return _pick("erase/sealed", fresh.items(), count, 1, seal, target.name) if count else []
