"""A tiny diffusers pipeline with an erasure applied, for tests to disturb."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import edits as some
import torch

import conceptzap
from conceptzap.base import Base
from conceptzap.edit import Erasure
from conceptzap.runtime.attach import attached
from conceptzap.testing import tiny

CONCEPT, NEUTRAL = some.ASKED[1], some.OTHER[1]
MIXED = [some.ASKED[0], some.OTHER[1], some.ASKED[1], some.OTHER[2]]


# family -> the erasure of its tiny base and what that draws, untouched and erased: the same every time
DRAWN: dict[str, tuple[Erasure, torch.Tensor, torch.Tensor]] = {}


class Scene:
    """A tiny pipeline, its erasure, and what it draws untouched and erased."""

    def __init__(self, family: str, base: Base | None = None) -> None:
        self.base = base or tiny(family)
        self.pipe = self.base.pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        known = None if base else DRAWN.get(family)
        self.erasure, self.plain, self.erased = known or self._drawn()
        if base is None:
            DRAWN[family] = self.erasure, self.plain, self.erased

    def _drawn(self) -> tuple[Erasure, torch.Tensor, torch.Tensor]:
        erasure, plain = some.erasure(self.base), self.draw()
        with attached(self.pipe.unet, erasure.edits):
            erased = self.draw()
        assert some.far(plain, erased) > 0.05
        return erasure, plain, erased

    def draw(self, pipe: Any = None, prompt: Any = CONCEPT, **more: Any) -> torch.Tensor:
        """Latents of two guided steps; row i from the noise of seed i."""
        more = {"guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "latent"} | more
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if "latents" not in more and "image" not in more:
            more["latents"] = self.base.noise(range(len(prompts or more["prompt_embeds"])))
        return (pipe or self.pipe)(prompt=prompts, **more).images

    def check(self, pipe: Any = None) -> None:
        """Still erased: the picture is the erased one within rounding."""
        drawn = self.draw(pipe)
        assert some.far(drawn, self.erased) < 1e-3
        assert some.far(drawn, self.plain) > 0.05


def applied(family: str = "sd1") -> Iterator[Scene]:
    """A fresh pipeline with the erasure applied; it is taken off again at the end."""
    made = Scene(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = conceptzap.apply(made.pipe, made.erasure)
        yield made
    handle.remove()
