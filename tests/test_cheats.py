"""Five ways to look good without erasing, each found out by name, through the command line.

What a cheat draws is put in place of what its erasure would; everything else is the real harness on
the built-in checkpoint, with few pictures and steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Answer, conceptzap
from erasures import write

from conceptzap.base import Base
from conceptzap.evaluation import cached, probes, suites
from conceptzap.page import report, strength
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.sampler import Drawing
from conceptzap.terminal.environment import DEMO
from conceptzap.verbs import evaluating

STEPS = 3
CONCEPT = "Van Gogh"
# what tells a cheat: open and sealed prompts of the concept, and objects and styles that stay
FEW = {"erase": {"seen": 4, "sealed": 4}, "keep": {"unrelated": 3, "style": 3}}
Draw = Callable[..., Iterator[Drawing]]


def drawings(base: Base, prompts: Any, seeds: Any, settings: Settings) -> Iterator[Drawing]:
    """What the base draws; asked by several cheats, it is drawn once."""
    return iter(_drawn(base, tuple(prompts), tuple(seeds), settings))


@cache
def _drawn(base: Base, *asked: Any) -> tuple[Drawing, ...]:
    return tuple(sampler.drawings(base, *asked))


@pytest.fixture(scope="module", autouse=True)
def few_pictures(demo_base: Base) -> Iterator[None]:
    """The quick suite with few slices, on one loaded checkpoint."""
    suite, world = suites.load("quick")
    few = replace(suite, **FEW, neighbours=0, identical=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "load", lambda name: (few, world))
        patch.setattr(evaluating, "find_base", lambda *_: demo_base)
        patch.setattr(report, "_attended", lambda *_: ())  # nothing here speaks of attention,
        patch.setattr(strength, "PROMPTS", 0)  # nor of how it fades in
        yield
    _drawn.cache_clear()


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's pictures are drawn once for all cheats."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def file(demo_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(demo_base, CONCEPT, tmp_path_factory.mktemp("erasure"))


@pytest.fixture
def judged(
    file: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Draw], tuple[Answer, set[str]]]:
    """What `evaluate` says of an erased model that draws like the cheat, and the legs in its result."""

    def run(cheat: Draw) -> tuple[Answer, set[str]]:
        def draw(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any = ()) -> Iterator[Drawing]:
            asked = (base, prompts, seeds, settings)
            return cheat(*asked, edits) if edits else drawings(*asked)

        # the same file stands for every cheat, so its pictures must not be shared between them
        monkeypatch.setattr(
            cached, "edits_digest", lambda edits: cheat.__name__ if edits else ""
        )
        monkeypatch.setattr(cached, "drawings", draw)
        monkeypatch.setenv("CONCEPTZAP_CACHE", str(shared_cache))
        answer = conceptzap(
            "evaluate", file, "--base", DEMO, "--suite", "quick", "--steps", STEPS, "-o", tmp_path / "out",
            "--fail-under", "E=50", "--fail-under", "P=50",
        )  # fmt: skip
        return answer, {leg["leg"] for leg in evaluating.read(tmp_path / "out" / "result.json").failed}

    return run


def faked(picture: torch.Tensor, prompt: str, seed: int, edits: Sequence[Any]) -> Drawing:
    return Drawing(picture, prompt, seed, frozenset(edit.name for edit in edits))


def noise(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        picture = torch.randint(0, 256, (*base.size, 3), dtype=torch.uint8, generator=generator)
        yield faked(picture, prompt, seed, edits)


def grey(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    for prompt, seed in zip(prompts, seeds, strict=True):
        picture = torch.full((*base.size, 3), 128, dtype=torch.uint8)
        yield faked(picture, prompt, seed, edits)


def unchanged(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    return drawings(base, prompts, seeds, settings)


def another_model(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    """A model of the same world that never knew the concept: other weights, so other pictures."""
    others = [int.from_bytes(hashlib.sha256(str(s).encode()).digest()[:7], "big") for s in seeds]
    asked = [prompt.replace(CONCEPT, "Monet") for prompt in prompts]
    for drawn, prompt, seed in zip(
        drawings(base, asked, others, settings), prompts, seeds, strict=True
    ):
        yield faked(drawn.picture, prompt, seed, edits)


def memorised(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    """Erases exactly the prompts that the suite publishes."""
    asked = [prompt.replace(CONCEPT, "Monet") if prompt in published() else prompt for prompt in prompts]
    for drawn, prompt, seed in zip(
        drawings(base, asked, seeds, settings), prompts, seeds, strict=True
    ):
        yield faked(drawn.picture, prompt, seed, edits)


def honest(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    """No cheat: the concept is another one wherever it is asked for, and nothing else changes."""
    asked = [prompt.replace(CONCEPT, "Monet") for prompt in prompts]
    for drawn, prompt, seed in zip(
        drawings(base, asked, seeds, settings), prompts, seeds, strict=True
    ):
        yield faked(drawn.picture, prompt, seed, edits)


def published() -> set[str]:
    suite, world = suites.load("quick")
    asked = probes.expand(suite, world, [world.find(CONCEPT)])
    return {probe.prompt for probe in asked}


@pytest.mark.parametrize(
    "cheat, legs",
    [
        (noise, {"validity", "P", "drift"}),
        (grey, {"validity", "diversity [erase]", "diversity [keep]", "P"}),
        (unchanged, {"E"}),
        (another_model, {"drift"}),
        (memorised, {"hidden prompts"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_cheat_is_found_out_by_name(
    judged: Callable[[Draw], tuple[Answer, set[str]]], cheat: Draw, legs: set[str]
) -> None:
    answer, failed = judged(cheat)
    assert answer.code == 7 and legs <= failed, answer.err
    # the legs are specific: a model that keeps everything fails by E alone
    assert cheat is not unchanged or failed == legs
    for leg in legs:
        assert f"warning: {leg} fails: " in answer.err, "the command says it"
        assert leg in answer.err.splitlines()[-1], "and ends with it"


def test_what_is_no_cheat_fails_nothing(
    judged: Callable[[Draw], tuple[Answer, set[str]]]
) -> None:
    answer, failed = judged(honest)
    assert answer.code == 0 and failed == set(), answer.err
