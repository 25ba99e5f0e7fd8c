"""What every method learns from on a random base is made in few steps, and once a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few steps to latents and gates, and what prompts say is read once."""
    from conceptzap.training import detector, objectives, states

    with pytest.MonkeyPatch.context() as patch, states.shared():
        patch.setattr(objectives, "DENOISING", 3)
        patch.setattr(detector, "STEPS", 40)
        yield
