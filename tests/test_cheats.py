"""Five ways to look good without erasing, each found out by name, through the command line.

What a cheat draws is put in place of what its erasure would; everything else is the real harness on
the built-in checkpoint, with few steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Answer, conceptzap
from erasures import write

from conceptzap import cells, probes, suites
from conceptzap.base import Base, load_base
from conceptzap.environment import DEMO, DEMO_UNET
from conceptzap.sampler import Drawing, drawings

pytestmark = pytest.mark.skipif(not DEMO_UNET.is_file(), reason="the built-in checkpoint is not there")

LIMIT, STEPS = 6, 6
CONCEPT, ANCHOR = "Van Gogh", "painting"
Draw = Callable[..., Iterator[Drawing]]


@pytest.fixture(scope="module")
def demo() -> Base:
    return load_base(str(DEMO))


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's pictures are drawn once for all cheats."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def file(demo: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(demo, CONCEPT, tmp_path_factory.mktemp("erasure"))


@pytest.fixture
def judged(
    file: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Draw], Answer]:
    """What `evaluate` says of an erased model that draws like the cheat."""

    def run(cheat: Draw) -> Answer:
        def draw(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any = ()) -> Iterator[Drawing]:
            chosen = cheat if edits else drawings
            return chosen(base, prompts, seeds, settings, edits)

        # the same file stands for every cheat, so its pictures must not be shared between them
        monkeypatch.setattr(
            cells, "edits_digest", lambda edits: cheat.__name__ if edits else ""
        )
        monkeypatch.setattr(cells, "drawings", draw)
        monkeypatch.setenv("CONCEPTZAP_CACHE", str(shared_cache))
        return conceptzap(
            "evaluate", file, "--base", DEMO, "--suite", "quick", "--limit", LIMIT, "--steps", STEPS,
            "-o", tmp_path / "out", "--fail-under", "E=1", "--fail-under", "P=1", "--json",
        )  # fmt: skip

    return run


def faked(picture: torch.Tensor, prompt: str, seed: int, edits: Sequence[Any]) -> Drawing:
    return Drawing(picture, prompt, seed, frozenset(edit.name for edit in edits))


def failed_legs(answer: Answer) -> set[str]:
    first = json.loads(answer.out.splitlines()[0])
    return {leg["leg"] for leg in first["failed"]}


def noise(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        picture = torch.randint(0, 256, (base.size, base.size, 3), dtype=torch.uint8, generator=generator)
        yield faked(picture, prompt, seed, edits)


def grey(base: Base, prompts: Any, seeds: Any, settings: Any, edits: Any) -> Iterator[Drawing]:
    for prompt, seed in zip(prompts, seeds, strict=True):
        picture = torch.full((base.size, base.size, 3), 128, dtype=torch.uint8)
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


def published() -> set[str]:
    suite, world = suites.load("quick")
    asked = probes.expand(suites.limited(suite, LIMIT), world, [world.find(CONCEPT)])
    return {probe.prompt for probe in asked}


@pytest.mark.parametrize(
    "cheat, legs",
    [
        (noise, {"validity", "P", "drift"}),
        (grey, {"validity", "diversity [keep]", "P"}),
        (unchanged, {"E"}),
        (another_model, {"drift"}),
        (memorised, {"sealed"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_cheat_is_found_out_by_name(
    judged: Callable[[Draw], Answer], cheat: Draw, legs: set[str]
) -> None:
    answer = judged(cheat)
    assert legs <= failed_legs(answer), answer.out
    assert answer.code == 7, answer.err


def test_the_base_unchanged_fails_nothing_but_the_erasure(judged: Callable[[Draw], Answer]) -> None:
    """The legs are specific: a model that keeps everything fails by E alone."""
    assert failed_legs(judged(unchanged)) == {"E"}
