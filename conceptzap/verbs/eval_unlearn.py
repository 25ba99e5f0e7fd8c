"""conceptzap as a technique of the `eval-unlearn` benchmark package (entry point, extra `eval-unlearn`).

    {"technique": {"name": "conceptzap", "config": {"lprompts": ["van-gogh.lprompt.safetensors"]}}}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from conceptzap.base import load_base
from conceptzap.edit import sort_edits
from conceptzap.report import Report
from conceptzap.result import MAX_SEED, Settings, check_seed
from conceptzap.runtime.sampler import drawings
from conceptzap.trust import admission


class ConceptzapTechnique:
    """Draws under a stack of erasures, as the package's runner asks, one picture a UNet call.

    The runner passes no seed and asks in batches, so picture i of a run has seed `seed` + i,
    counted over all its batches. `erase_concept` is read by some of the package's metrics and not
    here. Raises what loading the base and the files raises.
    """

    def __init__(
        self,
        lprompts: Sequence[str],
        base: str = "demo",
        strength: float = 1.0,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 4.0,
        device: str = "auto",
        erase_concept: str = "",
    ) -> None:
        self.base = load_base(base, device)
        loaded = admission.load_all((path, strength) for path in lprompts)
        admission.admit_all(self.base, [one.erasure for one in loaded], False, Report())
        self.edits = sort_edits(edit for one in loaded for edit in one.edits)
        self.settings = Settings(steps=steps, guidance=guidance)
        self.next_seed = check_seed(seed)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **_: Any) -> list[Image.Image]:
        """One picture a prompt; `seed`, where the caller gives one, is that of the first."""
        first = self.next_seed if seed is None else check_seed(seed)
        self.next_seed = (first + len(prompts)) & MAX_SEED
        seeds = [(first + index) & MAX_SEED for index in range(len(prompts))]
        drawn = drawings(self.base, list(prompts), seeds, self.settings, self.edits)
        return [Image.fromarray(one.picture.numpy()) for one in drawn]
