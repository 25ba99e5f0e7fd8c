"""Suites: sets of probes by name, their concepts and the nearest neighbours of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from conceptzap.base import Base
from conceptzap.errors import UsageError
from conceptzap.evaluation import probes
from conceptzap.evaluation.comparison import Annotation
from conceptzap.evaluation.probes import Subject, Suite, World
from conceptzap.registry import config, family
from conceptzap.result import Probe, Settings

FOLDER = "suites"
CONFUSED = 8  # base pictures of a concept that are asked what else the judges see in them


def names() -> list[str]:
    return config.preset_names(FOLDER)


def load(name: str) -> tuple[Suite, World]:
    """A suite of the package with the world its prompts are drawn from; `UsageError` for no name of one."""
    if name not in names():
        raise UsageError(f"no suite is called {name!r}", family.suggest(name, names()))
    table = config.preset(name, FOLDER)
    known = {field: table[field] for field in Suite.__dataclass_fields__ if field in table}
    suite = Suite(**{"name": name, **known, "judges": tuple(table.get("judges", ()))})
    about = table["world"]
    world = family.load("judges", about).world() if isinstance(about, str) else probes.world(about)
    return suite, world


def limited(suite: Suite, most: int | None) -> Suite:
    """The suite with at most so many pictures of a slice (and as many drawn one by one)."""
    if most is None:
        return suite
    if most < 1:
        raise UsageError(f"--limit {most} is out of range", "use 1 or more")
    erase, keep = (
        {name: min(count, most) for name, count in counts.items()} for counts in (suite.erase, suite.keep)
    )
    return replace(suite, erase=erase, keep=keep, identical=min(suite.identical, most))


def find(suite: Suite, world: World, concepts: Sequence[str]) -> list[Subject]:
    """The world's subjects for some words; a word that has no prompts in a suite is a `UsageError`."""
    found = {}
    for concept in concepts:
        subject = world.find(concept)
        if subject is None:
            known = [subject.name for subject in world.subjects if subject.kind != probes.SCENE]
            raise UsageError(
                f"the suite {suite.name} has no prompts for {concept!r}", family.suggest(concept, known)
            )
        found[subject] = None
    return list(found)


def without(world: World, concepts: Sequence[str]) -> World:
    """The world less the subjects that some words stand for, as far as it has any."""
    gone = {subject.name for concept in concepts if (subject := world.find(concept))}
    return replace(world, subjects=tuple(s for s in world.subjects if s.name not in gone))


def by_text(base: Base, world: World, target: Subject) -> list[Subject]:
    """Other subjects of the target's kind, nearest first by the cosine of their captions' text states.

    States are centred over all candidates: what every caption shares says nothing.
    """
    others = [s for s in world.of_kind(target.kind) if s.name != target.name]
    captions = [_caption(world, subject) for subject in (target, *others)]
    states = torch.cat([base.encode([text]).states.flatten(1).float() for text in captions])
    unit = torch.nn.functional.normalize(states - states.mean(0), dim=-1)
    order = (unit[1:] @ unit[0]).argsort(descending=True, stable=True).tolist()
    return [others[index] for index in order]


def _caption(world: World, subject: Subject) -> str:
    if subject.kind != probes.STYLE:
        return probes.fill(world.templates[world.plain][0][0], subject.words[0])
    thing = next(s for s in world.subjects if s.kind != probes.STYLE)
    return probes.fill(world.templates[subject.name][0][0], thing.words[0])


def by_confusion(annotations: Sequence[Annotation], world: World, target: Subject) -> list[Subject]:
    """Other subjects, nearest first by how strongly the judges see them in pictures of the target."""
    weights: dict[str, float] = {}
    for annotation in annotations:
        seen, strengths = (one.get(target.kind, ()) for one in (annotation.labels, annotation.scores))
        pairs = zip(seen, strengths, strict=True)
        for labels, scores in pairs:
            for label, value in zip(labels, scores, strict=False):
                weights[label] = weights.get(label, 0.0) + value
    ranked = sorted(weights, key=lambda label: (-weights[label], label))
    found = (world.find(label) for label in ranked)
    return [s for s in found if s is not None and s.kind == target.kind and s.name != target.name]


def nearest(count: int, text: Sequence[Subject], confused: Sequence[Subject]) -> list[Subject]:
    """`count` neighbours: half by confusion, the rest by text."""
    chosen = dict.fromkeys(confused[: count // 2])
    for subject in text:
        if len(chosen) < count:
            chosen.setdefault(subject)
    return list(chosen)


def portrait(suite: Suite, world: World, target: Subject) -> tuple[Probe, ...]:
    """A few probes of the target alone, to see what the judges confuse it with."""
    few = Suite(suite.name, "", suite.judges, {"seen": CONFUSED}, {})
    return probes.expand(few, world, [target])


def settings(suite: Suite, steps: int | None, guidance: float | None, batch: int | None) -> Settings:
    """How a suite's pictures are drawn: its own numbers unless others are given."""
    return Settings(
        steps=suite.steps if steps is None else steps,
        guidance=suite.guidance if guidance is None else guidance,
        batch=suite.batch if batch is None else batch,
    )
