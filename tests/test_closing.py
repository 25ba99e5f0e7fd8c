"""What `erase` ends with: figures, the sentence that says them, pictures; nothing is drawn in vain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from edits import always, eraser, gate, tokens, window

from conceptzap.base import Base
from conceptzap.evaluation import cached, suites
from conceptzap.evaluation import closing as module
from conceptzap.evaluation.cached import CachedSampler
from conceptzap.evaluation.closing import closing
from conceptzap.result import Settings
from conceptzap.task import Task

TASK = Task(("Van Gogh",), ("painting",), (), ("style",))
LOOK = Settings(steps=30, batch=4)


@pytest.fixture(autouse=True)
def small(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A suite of a few pictures in one step; the prompts that the erased model is asked for."""
    suite, world = suites.load(module.SUITE)
    few = replace(suite, steps=1, erase={"seen": 2, "held-out": 2}, keep={"unrelated": 2, "style": 2})
    monkeypatch.setattr(module.suites, "load", lambda name: (few, world))
    asked: list[str] = []
    draw = CachedSampler._draw

    def drawing(self: CachedSampler, probes: tuple) -> object:
        assert self.settings.steps == 1
        asked.extend(probe.prompt for probe in probes if self.edits)
        return draw(self, probes)

    monkeypatch.setattr(CachedSampler, "_draw", drawing)
    yield asked


@cache
def found_by_text(base: Base) -> module.Closing:
    """What is found of an erasure behind a gate that reads the text, drawn in the first test's cache."""
    return closing(base, eraser(base), TASK, LOOK, 0)


def test_what_no_gate_opens_for_is_not_drawn_again_and_nothing_else_changes(
    demo_base: Base, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = eraser(demo_base)
    found_by_text.cache_clear()
    found = found_by_text(demo_base)
    assert small and all("gogh" in prompt.lower() for prompt in small)
    small.clear()
    for place in (module, cached):
        monkeypatch.setattr(place, "acted_on", lambda base, edits, asked, settings: [True] * len(asked))
    whole = closing(demo_base, edits, TASK, LOOK, 0)
    assert any("gogh" not in prompt.lower() for prompt in small)
    assert (whole.scores, whole.verdict) == (found.scores, found.verdict)
    for one, other in zip((*found.concept, *found.kept), (*whole.concept, *whole.kept), strict=True):
        assert (one.prompt, one.seed) == (other.prompt, other.seed)
        assert np.array_equal(one.before, other.before)
        assert np.abs(one.after.astype(int) - other.after).max() <= 1  # other batches, other rounding


def test_the_pictures_are_of_the_concept_and_of_the_rest(demo_base: Base) -> None:
    found = found_by_text(demo_base)
    assert [len(found.concept), len(found.kept)] == [4, 4]
    assert all("gogh" in one.prompt.lower() for one in found.concept)
    assert all(not np.array_equal(one.before, one.after) for one in found.concept)
    assert all(np.array_equal(one.before, one.after) for one in found.kept)
    assert found.verdict.startswith("Van Gogh is gone from ") and " of 4 pictures; " in found.verdict
    assert found.verdict.endswith(" others kept")


@pytest.mark.parametrize("gated", [False, True])
def test_only_gates_that_read_the_text_alone_say_beforehand(gated: bool, demo_base: Base) -> None:
    edit = tokens(demo_base, gates=[window(0, 999)] if gated else [])
    asked = suites.load(module.SUITE)
    probes = module.probes.expand(*asked, [asked[1].find("Van Gogh")])
    assert all(cached.acted_on(demo_base, [edit], probes, LOOK))


def test_under_gates_that_look_it_is_the_base_that_is_not_asked_in_vain(
    demo_base: Base, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures and pictures as by the text alone, which opens the same here."""
    edits = [tokens(demo_base, gates=[gate(demo_base)])]
    found = closing(demo_base, edits, TASK, LOOK, 0)
    looking = [tokens(demo_base, gates=[gate(demo_base), always(demo_base)])]
    drawn: list[tuple[str, int]] = []
    draw = CachedSampler._draw
    monkeypatch.setattr(
        CachedSampler, "_draw",
        lambda self, asked: drawn.extend((p.prompt, p.seed) for p in asked) or draw(self, asked),
    )
    for path in own_cache.rglob("*.png"):
        path.unlink()
    again = closing(demo_base, looking, TASK, LOOK, 0)
    twice = [prompt for (prompt, _), count in Counter(drawn).items() if count > 1]
    assert twice and all("gogh" in prompt.lower() for prompt in twice)
    assert (again.scores, again.verdict) == (found.scores, found.verdict)
    for one, other in zip((*found.concept, *found.kept), (*again.concept, *again.kept), strict=True):
        assert np.abs(one.before.astype(int) - other.before).max() <= 1  # other batches, other rounding
        assert np.abs(one.after.astype(int) - other.after).max() <= 1


def test_a_limit_is_of_the_pictures_of_a_concept(demo_base: Base) -> None:
    """At most so many of each, the rest in proportion; 0 measures nothing."""
    suite, _ = suites.load("quick")
    counts = {"seen": 4, "held-out": 10, "synonym": 6, "crossed": 4}
    whole = replace(suite, erase=counts, keep={"unrelated": 16, "style": 16})
    one, few = module._shared(whole, 1, 1), module._shared(whole, 1, 5)
    assert one.erase == {"held-out": 1} and one.keep == {"unrelated": 1, "style": 1}
    assert few.erase == {"seen": 1, "held-out": 2, "synonym": 1, "crossed": 1}
    assert few.keep == {"unrelated": 4, "style": 3}
    many = module._shared(whole, 60, 1)
    assert many.erase == {"held-out": 1} and many.keep == whole.keep
    assert module._shared(whole, 1, 99) == whole and module._shared(whole, 2, None).erase["held-out"] == 5
    assert closing(demo_base, eraser(demo_base), TASK, LOOK, 0, limit=0) == module.Closing()


def test_of_many_concepts_the_verdict_counts_them(demo_base: Base, small: list[str]) -> None:
    names = ("Van Gogh", "Monet", "church", "dog", "cat", "kitty")
    task = Task(names, ("",) * len(names), (), ("style", "style", *["object"] * 4))
    found = closing(demo_base, eraser(demo_base), task, LOOK, 0, limit=1)
    assert list(found.shown) == list(names) and all(n == 1 for _, n in found.shown.values())
    gone = sum(not leaks for leaks, _ in list(found.shown.values())[:5])
    assert found.verdict.startswith(f"{gone} of 5 concepts are gone from all pictures; ")
    assert found.scores["leak"].n == 5 and found.shown["cat"] == found.shown["kitty"]
